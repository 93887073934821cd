"""Open a picture file, or say exactly why it cannot be opened.

Nothing here ever stands in for a broken picture: a model trained on a substitute learns the wrong caption.
"""

import base64
import io
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from deadpan.errors import DeadpanError

MAX_PIXELS = 178_956_970
"""The most pixels a picture may claim: Pillow's own threshold for a decompression bomb (half a gigabyte of RGB)."""


# Pillow warns at half of its limit. A picture that is still allowed is no news; and a filter set around each call would
# not be safe in threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class PictureError(DeadpanError):
    """A picture that is missing, damaged, not a picture, or too large to open safely."""


def _open(path: Path) -> Image.Image:
    if not path.is_file():
        raise PictureError(
            "The picture is missing.", where=path, fix="restore the file, or remove the record"
        )
    try:
        image = Image.open(path)
    except UnidentifiedImageError:
        raise PictureError(
            "The file is not a picture that Pillow can read.",
            where=path,
            fix="convert it to JPEG, PNG or WebP, or remove the record",
        ) from None
    except Image.DecompressionBombError as error:
        raise _bomb(path, str(error)) from None
    except OSError as error:
        raise PictureError(f"The picture cannot be opened: {error}.", where=path) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise _bomb(path, f"{width}x{height} = {width * height:,} pixels")
    return image


def _bomb(path: Path, found: str) -> PictureError:
    return PictureError(
        "The picture is too large to open safely (a decompression bomb?).",
        where=path,
        expected=f"at most {MAX_PIXELS:,} pixels",
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
    image = _open(path)
    try:
        with image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        # The set that Pillow's decoders raise for damaged files; SyntaxError is what its PNG reader uses.
        raise PictureError(
            f"The picture is damaged: {error}.",
            where=path,
            fix="replace the file, or remove the record",
        ) from None


def data_uri(picture: Image.Image, long_edge: int) -> str:
    """A picture within a web page: scaled down to a longer edge in pixels, as JPEG, as a `data:` address."""
    small = picture.copy()
    small.thumbnail((long_edge, long_edge), Image.Resampling.LANCZOS)
    jpeg = io.BytesIO()
    small.save(jpeg, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode('ascii')}"
