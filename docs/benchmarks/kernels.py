"""Make kernels.md and its plots anew from kernels.json beside this file: run ``python -m docs.benchmarks.kernels``.

The data come from `mbq-export bench --kernels -o docs/benchmarks`, which writes the page too; this is for when only the
page's words have changed.
"""

import json
import sys
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "kernels"))

from mbq_export.evaluate.kernel_bench import write_kernel_result  # noqa: E402

if __name__ == "__main__":
    write_kernel_result(HERE, json.loads((HERE / "kernels.json").read_text()))
