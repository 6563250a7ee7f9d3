"""The kernel benchmark from a checkout, nothing installed: see `mbq_kernels.bench.__main__`."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from mbq_kernels.bench.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
