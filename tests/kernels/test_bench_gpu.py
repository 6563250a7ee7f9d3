"""The short suite on a GPU: every answer of ours right, every time there, graphs included."""

import pytest
import torch

from mbq_kernels.bench.document import check_document, failures
from mbq_kernels.bench.run import BUILT, Request, run
from mbq_kernels.bench.shapes import SHORT

LARGE_BYTES = 25 << 20
FASTEST_PERCENT = 115
"""No kernel reads much faster than the one that does nothing else: beyond this, weights came from a cache."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]


def test_the_short_suite_is_right_and_timed() -> None:
    assert BUILT.is_file(), "build the kernels first: python kernels/build.py"
    kept = []
    result = check_document(run(Request(suite=SHORT), keep=lambda part: kept.append(len(part))))
    assert failures(result) == []
    ours = [row for row in result["rows"] if row["source"] in {"base", "cuda", "triton"}]
    assert [row["timing_why"] for row in ours if row["timing"] is None] == []
    large = [row for row in ours if row["m"] == 1 and row["weight_bytes"] > LARGE_BYTES]
    assert all(row["percent_of_read"] < FASTEST_PERCENT for row in large)
    assert all(row["timing"] is not None for row in result["chain"] if row["source"] != "peer")
    assert all(row["timing"] is not None for row in result["decode"]["rows"])
    assert len(kept) == 3
