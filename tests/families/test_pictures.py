"""Every kind of picture becomes the same upright RGB pixels, or a named error."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mbq_export.errors import FormatError
from mbq_export.families.pictures import MOST_PIXELS, as_rgb, read_picture

RED, WHITE = (255, 0, 0), (255, 255, 255)


def pixel(path: Path) -> tuple[int, ...]:
    image = read_picture(path)
    assert image.mode == "RGB"
    found = image.getpixel((0, 0))
    assert isinstance(found, tuple)
    return found


def test_rgb_is_left_as_it_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert np.array_equal(np.asarray(read_picture(tmp_path / "x.png")), pixels)


def test_grey_palette_and_cmyk_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (2, 2), 77).save(tmp_path / "grey.png")
    assert pixel(tmp_path / "grey.png") == (77, 77, 77)
    Image.new("RGB", (2, 2), RED).convert("P").save(tmp_path / "palette.png")
    assert pixel(tmp_path / "palette.png") == RED
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "cmyk.tiff")
    assert pixel(tmp_path / "cmyk.tiff") == RED
    Image.new("1", (2, 2), 1).save(tmp_path / "bits.png")
    assert pixel(tmp_path / "bits.png") == WHITE


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert pixel(tmp_path / "clear.png") == WHITE
    Image.new("RGBA", (2, 2), (255, 0, 0, 255)).save(tmp_path / "solid.png")
    assert pixel(tmp_path / "solid.png") == RED
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0] + [0] * 765)
    palette.save(tmp_path / "palette.gif", transparency=0)
    assert pixel(tmp_path / "palette.gif") == WHITE


def test_16_bit_grey_keeps_its_high_byte(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 0x4D01, np.uint16)).save(tmp_path / "deep.png")
    assert pixel(tmp_path / "deep.png") == (0x4D,) * 3


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2), WHITE)
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: top left is really top right
    image.save(tmp_path / "x.png", exif=exif)
    upright = read_picture(tmp_path / "x.png")
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (0, 0, 0)


def test_first_frame_of_an_animation_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (2, 2), color) for color in (RED, (0, 255, 0))]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert pixel(tmp_path / "x.gif") == RED


def test_array_is_converted_by_the_same_rule() -> None:
    assert as_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "svg", "folder"])
def test_file_that_is_no_picture_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind == "truncated":
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        path.write_bytes(path.read_bytes()[:-900])
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"hello", "svg": b"<svg xmlns='x'/>"}[kind])
    with pytest.raises(FormatError) as caught:
        read_picture(path)
    assert caught.value.code == "E4304"
    assert "x.jpg" in caught.value.message
    assert str(tmp_path) not in str(caught.value)


def bomb(path: Path, width: int, height: int) -> Path:
    """A PNG whose header states a size and whose data is almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize("size", [(30_000, 30_000), (MOST_PIXELS + 1, 1), (7000, 6000)])
def test_picture_with_too_many_pixels_is_refused_from_its_header(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    with pytest.raises(FormatError, match="is too large") as caught:
        read_picture(bomb(tmp_path / "x.png", *size))
    assert caught.value.code == "E4306"


def test_huge_text_chunk_is_refused(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 << 20)))
    (tmp_path / "x.png").write_bytes(data[:33] + text + data[33:])
    with pytest.raises(FormatError) as caught:
        read_picture(tmp_path / "x.png")
    assert caught.value.code == "E4304"
