"""Pictures from the web: which addresses are connected to, and how much is read from them."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from deadpan.data.pictures import PictureError
from deadpan.serve.remote import Remote, is_public


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
        ("localhost", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


def once(*addresses: str) -> Callable[[str, int], Awaitable[list[str]]]:
    """A resolver that gives these addresses in turn, the last one ever after."""
    left = list(addresses)

    async def resolve(host: str, port: int) -> list[str]:
        return [left.pop(0) if len(left) > 1 else left[0]]

    return resolve


def fetched(answer: bytes, path: str = "/a.png", *, hold: bool = False, limit: int = 100) -> bytes:
    """What is fetched from a server on this machine that gives one answer, and has a public address for now."""

    async def story() -> bytes:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
            if hold:
                await asyncio.sleep(5)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        remote = Remote(0.3, once("127.0.0.1", "10.0.0.1"), lambda a: a == "127.0.0.1")
        try:
            return await remote.fetch(f"http://picture.test:{port}{path}", "it", limit)
        finally:
            server.close()

    return asyncio.run(story())


def reply(status: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode() + body


def test_a_file_is_read() -> None:
    assert fetched(reply("200 OK", "Content-Length: 3", body=b"abc")) == b"abc"
    chunked = reply("200 OK", "Transfer-Encoding: chunked", body=b"3\r\nabc\r\n0\r\n\r\n")
    assert fetched(chunked) == b"abc"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (reply("404 Not Found", "Content-Length: 0"), "status 404"),
        (reply("200 OK", "Content-Length: 101", body=b"x" * 101), "more than 100 bytes"),
        (reply("200 OK", body=b"x" * 5000), "more than 100 bytes"),
        (reply("200 OK", "Content-Length: 9", body=b"x"), "RemoteProtocolError"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "RemoteProtocolError"),
    ],
)
def test_what_is_no_file_of_that_size(answer: bytes, found: str) -> None:
    with pytest.raises(PictureError, match="could not be fetched") as error:
        fetched(answer)
    assert error.value.found == found


def test_an_answer_that_does_not_end_is_left() -> None:
    with pytest.raises(PictureError) as error:
        fetched(reply("200 OK", "Content-Length: 9", body=b"x"), hold=True)
    assert error.value.found == "not there after 0.3 seconds"


@pytest.mark.parametrize(
    "location", ["http://elsewhere.test/", "/same-host-that-resolves-otherwise-now"]
)
def test_a_redirect_is_checked_again(location: str) -> None:
    with pytest.raises(PictureError, match="not on the open internet"):
        fetched(reply("302 Found", f"Location: {location}", "Content-Length: 0"))


@pytest.mark.parametrize(
    "location",
    ["file:///etc/passwd", "ftp://a.test/", "http://user:word@a.test/", "http://["],
)
def test_a_redirect_leads_nowhere_else(location: str) -> None:
    with pytest.raises(PictureError, match="could not be fetched"):
        fetched(reply("302 Found", f"Location: {location}", "Content-Length: 0"))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/a",
        "http://localhost:1/a",
        "http://[::1]:1/a",
        "http://2130706433/",
        "http://0x7f.1/",
        "https://169.254.169.254/latest/meta-data",
        "http://[::ffff:127.0.0.1]/",
    ],
)
def test_the_servers_own_network_is_out_of_reach(url: str) -> None:
    with pytest.raises(PictureError, match="not on the open internet"):
        asyncio.run(Remote().fetch(url, "it", 100))


def test_one_private_address_among_public_ones_is_enough_to_refuse() -> None:
    async def both(host: str, port: int) -> list[str]:
        return ["93.184.216.34", "10.0.0.1"]

    with pytest.raises(PictureError, match="not on the open internet"):
        asyncio.run(Remote(resolve=both).fetch("http://a.test/", "it", 100))
