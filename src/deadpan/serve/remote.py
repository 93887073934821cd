"""Pictures from the web, fetched so that a request cannot reach into the network that the server stands in.

The host's name is resolved once, every address that it has is checked, and the connection goes to the very address
checked: a name that resolves otherwise a moment later changes nothing. A redirect is a new address and is checked
again. No proxy and no cookie is used.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable
from urllib.parse import SplitResult, urljoin, urlsplit

import h11

from deadpan.data.pictures import PictureError

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_REDIRECTS = 3

Resolve = Callable[[str, int], Awaitable[list[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, whatever IPv4 address may be wrapped in it."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # an IPv6 address with a zone is a local one
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if not all(is_public(str(v4)) for v4 in inner if v4 is not None):
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class Remote:
    """Fetches pictures by http and https.

    Args:
        timeout: Seconds for one picture, redirects included.
        resolve: Finds a host's addresses.
        allowed: Which addresses may be connected to.
    """

    def __init__(
        self,
        timeout: float = 10.0,
        resolve: Resolve = resolve,
        allowed: Callable[[str], bool] = is_public,
    ) -> None:
        self._timeout, self._resolve, self._allowed = timeout, resolve, allowed
        self._tls = ssl.create_default_context()

    async def fetch(self, url: str, place: str, max_bytes: int) -> bytes:
        """Fetch a picture file.

        Args:
            url: Where it is.
            place: What to call it in messages.
            max_bytes: The most bytes that are read.

        Raises:
            PictureError: If the address is not allowed, or does not give a file of that size in time.
        """
        try:
            async with asyncio.timeout(self._timeout):
                for _ in range(_REDIRECTS + 1):
                    found = await self._get(url, place, max_bytes)
                    if isinstance(found, bytes):
                        return found
                    url = urljoin(url, found)
        except TimeoutError:
            raise _failed(place, f"not there after {self._timeout:g} seconds") from None
        except (OSError, ValueError, h11.RemoteProtocolError) as error:
            raise _failed(place, type(error).__name__) from None
        raise _failed(place, f"more than {_REDIRECTS} redirects")

    async def _get(self, url: str, place: str, max_bytes: int) -> bytes | str:
        """The file, or the address that it has moved to."""
        parts, port = _split(url, place)
        host = str(parts.hostname)
        addresses = await self._resolve(host, port)
        if not addresses or not all(map(self._allowed, addresses)):
            raise PictureError("The picture's address is not on the open internet.", where=place)
        secure = parts.scheme == "https"
        reader, writer = await asyncio.open_connection(
            addresses[0],
            port,
            ssl=self._tls if secure else None,
            server_hostname=host if secure else None,
        )
        try:
            connection = h11.Connection(h11.CLIENT)
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            headers = {
                "Host": parts.netloc,
                "Accept": "image/*",
                "Accept-Encoding": "identity",
                "User-Agent": "deadpan",
                "Connection": "close",
            }
            request = h11.Request(method="GET", target=target, headers=list(headers.items()))
            writer.write(connection.send(request) or b"")
            writer.write(connection.send(h11.EndOfMessage()) or b"")
            return await _answer(connection, reader, place, max_bytes)
        except h11.LocalProtocolError:
            raise _failed(place, "an address that cannot be asked for") from None
        finally:
            writer.close()


async def _answer(
    connection: h11.Connection, reader: asyncio.StreamReader, place: str, max_bytes: int
) -> bytes | str:
    data = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(65_536))
        elif isinstance(event, h11.Response):
            location = dict(event.headers).get(b"location")
            if event.status_code in (301, 302, 303, 307, 308) and location is not None:
                return location.decode("ascii")
            if event.status_code != 200:
                raise _failed(place, f"status {event.status_code}")
        elif isinstance(event, h11.Data):
            data += event.data
            if len(data) > max_bytes:
                raise _failed(place, f"more than {max_bytes:,} bytes")
        elif isinstance(event, h11.EndOfMessage):
            return bytes(data)


def _split(url: str, place: str) -> tuple[SplitResult, int]:
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        raise _failed(place, "no http or https address") from None
    if not parts.hostname or parts.username is not None or parts.password is not None:
        raise _failed(place, "an address without a host, or with a user")
    return parts, port


def _failed(place: str, found: str) -> PictureError:
    return PictureError(
        "The picture could not be fetched.",
        where=place,
        found=found,
        fix="send the picture itself, as data:image/png;base64,...",
    )
