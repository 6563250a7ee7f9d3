"""Photograph a report for the README: ``python -m docs.images.screenshot report.html docs/images/report.png``.

The picture shows the verdicts and the plots of some chapters; the rest is taken out of it, not out of the
report. Needs a browser.
"""

import argparse
import io
from pathlib import Path
from typing import Final

from PIL import Image

from tests.evaluate.browser import open_tab

WIDTH: Final = 1200
COLOURS: Final = 256
TAKE_OUT: Final = """
for (const part of document.querySelectorAll("nav, .tables, .missing, details, #raw, section p:not(.note)"))
  if (!part.closest(".verdict")) part.remove();
for (const part of document.querySelectorAll("main > section"))
  if (!["verdict", "quantization", "validation", "latency", "accuracy", "comparison"].includes(part.id)) part.remove();
"""


def main() -> None:
    """Take the picture, in few colours so that the file stays small."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    with open_tab() as tab:
        tab.open(options.report, width=WIDTH)
        tab.value(TAKE_OUT)
        shot = Image.open(io.BytesIO(tab.screenshot()))
    shot.convert("RGB").quantize(COLOURS).save(options.picture, optimize=True)
    print(
        f"{options.picture}: {shot.width} x {shot.height}, {options.picture.stat().st_size} bytes"
    )


if __name__ == "__main__":
    main()
