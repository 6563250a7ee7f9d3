"""A picture file to the pixels every stage sees: first frame, upright, RGB, 8 bits.

Calibration and inference call the same function, so a picture is never one thing here and another there.
Sizes are read from the header and refused before anything is decoded.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from mbq_export.errors import FormatError
from mbq_export.reading import regular_size

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS: Final = 40_000_000
MOST_PADDED: Final = 100_000_000
MOST_BYTES: Final = 256 << 20
FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def read_picture(path: Path) -> "Image":
    """Decode a picture file.

    Transparency is laid on white, 16-bit grey is scaled to 8 bits, and an ICC profile is ignored.

    Returns:
        Mode RGB, turned upright as its EXIF orientation says.

    Raises:
        FormatError: E4304 for a file that is missing or cannot be decoded, E4306 for one with too many
            pixels.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    regular_size(path, code="E4304", limit=MOST_BYTES)
    try:
        # The library's own warning about large pictures comes at another limit than ours.
        with warnings.catch_warnings(), Image.open(path, formats=FORMATS) as image:
            warnings.simplefilter("ignore")
            check_size(image, path.name)
            image.seek(0)
            return as_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise _too_large(path.name, str(error).partition(" exceeds")[0]) from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError) as error:
        raise FormatError(
            "E4304",
            f"{path.name} cannot be decoded: {str(error).replace(str(path), path.name)}.",
            why=f"a picture is one of {', '.join(FORMATS)}",
            fix="replace the file",
        ) from error


def check_size(image: "Image", name: str, *, padded: bool = False) -> None:
    """Refuse a picture by the size its header states.

    Args:
        image: Need not be decoded yet.
        name: How messages call it.
        padded: It will be padded to a square, as each of several pictures is.

    Raises:
        FormatError: E4306 for too many pixels, E4304 for none.
    """
    width, height = image.size
    if padded and max(width, height) ** 2 > MOST_PADDED:
        raise _too_large(name, f"{width} x {height} pixels, padded to a square")
    if width * height > MOST_PIXELS:
        raise _too_large(name, f"{width} x {height} pixels")
    if not width * height:
        raise FormatError(
            "E4304", f"{name} has no pixels ({width} x {height}).", fix="replace the file"
        )


def as_rgb(image: "Image") -> "Image":
    """Convert any mode to RGB with 8 bits: the one home of that rule."""
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode == "I":
        # Converting directly clips at 255; these modes hold 16-bit grey.
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


def _too_large(name: str, found: str) -> FormatError:
    return FormatError(
        "E4306",
        f"{name} is too large: {found}.",
        why=(
            f"pictures have at most {MOST_PIXELS} pixels, {MOST_PADDED} once padded to a square; the size is "
            "read before decoding"
        ),
        fix="shrink the picture",
    )
