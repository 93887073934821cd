"""The pictures of requests: from data URIs or, if allowed, from the web, within limits, into RGB.

No address reaches the file system: what is neither a data URI nor http(s) is refused.
"""

import asyncio
import base64
import binascii
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from deadpan.data import pictures
from deadpan.data.pictures import PictureError
from deadpan.serve.budget import Budget
from deadpan.serve.remote import Remote

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What people's pictures are; each further decoder is one more for strangers to try."""

MAX_BYTES = 10 * 2**20
"""The most bytes of a picture file."""

MAX_PIXELS = 20_000_000
"""The most pixels of a picture; a model sees a few million of them."""

_DATA_URI = re.compile(r"data:(image/[\w.+-]+)?;base64,", re.IGNORECASE)


class Pictures:
    """Opens the pictures of requests.

    Args:
        remote: Fetches pictures from the web; None if that is not allowed.
        max_bytes: The most bytes of a picture file.
        max_pixels: The most pixels of a picture.
        held: How many pictures of the largest size may be in memory at once, over all requests.
    """

    def __init__(
        self,
        remote: Remote | None = None,
        max_bytes: int = MAX_BYTES,
        max_pixels: int = MAX_PIXELS,
        held: int = 16,
    ) -> None:
        self._remote = remote
        self.max_bytes, self._max_pixels = max_bytes, max_pixels
        self.budget = Budget(held * max_pixels, "pixels")
        # Not the loop's own pool: others are not to wait behind a large picture.
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="pictures")

    async def read(self, places: Sequence[tuple[str, str]]) -> list[Image.Image]:
        """Open pictures.

        Args:
            places: For each, what to call it and its address.

        Raises:
            PictureError: If one is broken, too large, or at an address that is not allowed.
            QueueFull: If too many pixels are in memory already.
        """
        return [await self._picture(place, url) for place, url in places]

    async def open(self, data: bytes, place: str) -> Image.Image:
        """Open the bytes of a picture file; raises as `read`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._decode, data, place)

    async def _picture(self, place: str, url: str) -> Image.Image:
        loop = asyncio.get_running_loop()
        if url[:5].lower() == "data:":
            return await loop.run_in_executor(self._pool, self._from_uri, url, place)
        if url[:5].lower() != "http:" and url[:6].lower() != "https:":
            raise PictureError(
                "The address of the picture is neither a data URI nor a web address.",
                where=place,
                expected="data:image/png;base64,...",
                found=repr(url[:40]),
            )
        if self._remote is None:
            raise PictureError(
                "This server fetches no pictures from the web.",
                where=place,
                fix="send the picture itself, as data:image/png;base64,...",
            )
        data = await self._remote.fetch(url, place, self.max_bytes)
        return await self.open(data, place)

    def _from_uri(self, uri: str, place: str) -> Image.Image:
        head = _DATA_URI.match(uri)
        if head is None:
            raise PictureError(
                "The data URI is not that of a picture in base64.",
                where=place,
                expected="data:image/png;base64,...",
                found=repr(uri[:40]),
            )
        encoded = len(uri) - head.end()
        if encoded // 4 * 3 > self.max_bytes + 2:
            raise too_many_bytes(place, self.max_bytes)
        try:
            data = base64.b64decode(uri[head.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise PictureError(f"The picture is not valid base64: {error}.", where=place) from None
        return self._decode(data, place)

    def _decode(self, data: bytes, place: str) -> Image.Image:
        if len(data) > self.max_bytes:
            raise too_many_bytes(place, self.max_bytes)
        opened = pictures.peek(data, place, self._max_pixels, FORMATS)
        pixels = opened.width * opened.height
        self.budget.take(pixels)
        try:
            image = pictures.rgb(opened, place)
        except BaseException:
            self.budget.give(pixels)
            raise
        self.budget.give_with(image, pixels)
        return image


def too_many_bytes(place: str, limit: int) -> PictureError:
    """The error for a file that is too large."""
    return PictureError(
        "The picture's file is too large.",
        where=place,
        expected=f"at most {limit:,} bytes",
        fix="scale the picture down",
    )
