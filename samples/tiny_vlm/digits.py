"""Write the package's digit file from scikit-learn's copy: python -m samples.tiny_vlm.digits.

digits.npy   (1797, 65) uint8: 64 ink values in [0, 16], row by row, then the label
"""

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

DIGIT_FILE: Final = Path(__file__).parents[2] / "mbq_export" / "calibrate" / "digits.npy"


def digit_table() -> NDArray[np.uint8]:
    """Return the 1,797 digits of `sklearn.datasets.load_digits` as (1797, 65) uint8."""
    pixels, labels = load_digits(return_X_y=True)
    return np.hstack([pixels, labels[:, None]]).astype(np.uint8)


if __name__ == "__main__":
    partial = DIGIT_FILE.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, digit_table(), allow_pickle=False)
    partial.rename(DIGIT_FILE)
    print(f"wrote {DIGIT_FILE.name}: {DIGIT_FILE.stat().st_size} bytes")
