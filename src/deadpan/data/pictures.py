"""Open a picture file, or say exactly why it cannot be opened.

Nothing here ever stands in for a broken picture: a model trained on a substitute learns the wrong caption.
"""

import base64
import hashlib
import io
import struct
import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from deadpan.errors import DeadpanError

MAX_PIXELS = 178_956_970
"""The most pixels a picture may claim: Pillow's own threshold for a decompression bomb (half a gigabyte of RGB)."""


# Pillow warns at half of its limit. A picture that is still allowed is no news; and a filter set around each call would
# not be safe in threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class PictureError(DeadpanError):
    """A picture that is missing, damaged, not a picture, or too large to open safely."""


_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, LookupError, ArithmeticError)
"""What Pillow's decoders raise for damaged files; SyntaxError is what its PNG reader uses."""


def _open(path: Path) -> Image.Image:
    if path.is_dir():
        raise PictureError(
            "The picture is a folder.",
            where=path,
            expected="a picture",
            fix="name one that is in it",
        )
    if not path.is_file():
        raise PictureError(
            "The picture is missing.", where=path, fix="put it there, or correct its path"
        )
    return _opened(path, path, MAX_PIXELS)


def _opened(
    source: Path | BinaryIO,
    where: str | Path,
    max_pixels: int,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    try:
        image = Image.open(source, formats=formats)
    except UnidentifiedImageError:
        raise PictureError(
            "The file is not a picture that Pillow can read.",
            where=where,
            fix="convert it to JPEG, PNG or WebP",
        ) from None
    except Image.DecompressionBombError as error:
        raise _bomb(where, max_pixels, str(error)) from None
    except _DAMAGE as error:
        raise PictureError(f"The picture cannot be opened: {error}.", where=where) from None
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise _bomb(where, max_pixels, f"{width}x{height} = {width * height:,} pixels")
    return image


def _bomb(where: str | Path, max_pixels: int, found: str) -> PictureError:
    return PictureError(
        "The picture is too large to open safely (a decompression bomb?).",
        where=where,
        expected=f"at most {max_pixels:,} pixels",
        found=found,
        fix="scale it down: a model sees at most a few million pixels of it",
    )


def picture_size(path: Path) -> tuple[int, int]:
    """Read (width, height) from the header, without decoding.

    Raises:
        PictureError: If the file is missing, not a picture, or too large.
    """
    with _open(path) as image:
        return image.size


def open_picture(path: Path) -> Image.Image:
    """Decode a picture fully into RGB, exactly as the official code does (`Image.open(path).convert("RGB")`).

    Raises:
        PictureError: If the file is missing, truncated, not a picture, or too large.
    """
    return rgb(_open(path), path)


def peek(data: bytes, where: str, max_pixels: int, formats: tuple[str, ...]) -> Image.Image:
    """Open the bytes of a picture file without decoding them, for `rgb` to do so once its size is accepted.

    Args:
        data: A picture file.
        where: What to call it in messages.
        max_pixels: The most pixels it may claim.
        formats: Pillow's names of the formats it may have.

    Raises:
        PictureError: If it is not such a picture, or too large.
    """
    return _opened(io.BytesIO(data), where, max_pixels, formats)


def rgb(image: Image.Image, where: str | Path) -> Image.Image:
    """Decode an opened picture fully into RGB, and close it.

    Raises:
        PictureError: If it is damaged.
    """
    try:
        with image:
            return image.convert("RGB")
    except _DAMAGE as error:
        raise PictureError(
            f"The picture is damaged: {error}.", where=where, fix="replace the file"
        ) from None


def digest(path: Path) -> str:
    """SHA-256 of a picture file.

    Raises:
        PictureError: If it is missing or cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise PictureError(f"The picture cannot be read: {error.strerror}.", where=path) from None


def data_uri(picture: Image.Image, long_edge: int) -> str:
    """A picture within a web page: scaled down to a longer edge in pixels, as WebP, as a `data:` address."""
    small = picture.copy()
    small.thumbnail((long_edge, long_edge), Image.Resampling.LANCZOS)
    webp = io.BytesIO()
    small.save(webp, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(webp.getvalue()).decode('ascii')}"
