import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from deadpan.data import pictures
from deadpan.data.pictures import PictureError, open_picture, picture_size


def forged_png(path: Path, width: int, height: int) -> Path:
    """A PNG of a few bytes that claims to be of any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def truncated_jpeg(path: Path) -> Path:
    noise = Image.effect_noise((200, 100), 90)
    noise.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("picture.tiff" if mode == "CMYK" else "picture.png")
    Image.new(mode, (7, 5)).save(path)
    picture = open_picture(path)
    assert (picture.mode, picture.size) == ("RGB", (7, 5))
    assert picture_size(path) == (7, 5)


def test_alpha_is_dropped_and_orientation_ignored(tmp_path: Path) -> None:
    clear, turned = tmp_path / "clear.png", tmp_path / "turned.jpg"
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(clear)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(turned, exif=exif)
    assert open_picture(clear).getpixel((0, 0)) == (10, 20, 30)
    assert open_picture(turned).size == picture_size(turned) == (4, 2)


def test_a_missing_picture(tmp_path: Path) -> None:
    for path, trouble in ((tmp_path / "gone.png", "is missing"), (tmp_path, "is a folder")):
        with pytest.raises(PictureError, match=trouble) as caught:
            open_picture(path)
        assert caught.value.where == str(path)


def test_words_are_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "words.jpg"
    path.write_text("<html>404</html>")
    for read in (open_picture, picture_size):
        with pytest.raises(PictureError, match="not a picture that Pillow can read"):
            read(path)


def test_a_truncated_jpeg_has_a_size_but_does_not_open(tmp_path: Path) -> None:
    path = truncated_jpeg(tmp_path / "cut.jpg")
    assert picture_size(path) == (200, 100)
    with pytest.raises(PictureError, match="damaged: image file is truncated"):
        open_picture(path)


def test_a_damaged_png_does_not_open(tmp_path: Path) -> None:
    path = forged_png(tmp_path / "hollow.png", 300, 200)
    assert picture_size(path) == (300, 200)
    with pytest.raises(PictureError, match="damaged"):
        open_picture(path)


@pytest.mark.parametrize("read", [open_picture, picture_size])
def test_a_bomb_is_not_opened(tmp_path: Path, read: object) -> None:
    path = forged_png(tmp_path / "bomb.png", 60_000, 60_000)
    assert callable(read)
    with pytest.raises(PictureError, match="too large") as caught:
        read(path)
    assert caught.value.where == str(path)
    assert caught.value.expected == "at most 178,956,970 pixels"


def test_the_limit_itself_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGB", (5, 4)).save(path)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 20)
    assert picture_size(path) == (5, 4)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 19)
    with pytest.raises(PictureError, match="too large") as caught:
        open_picture(path)
    assert caught.value.found == "5x4 = 20 pixels"


def test_a_large_picture_within_the_limit_does_not_warn(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGB", (30, 10)).save(path)
    # In a process of its own: pytest sets its own warning filters over the module's.
    code = (
        "import sys; from pathlib import Path; from PIL import Image; "
        "from deadpan.data.pictures import open_picture; "
        "Image.MAX_IMAGE_PIXELS = 200; open_picture(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
