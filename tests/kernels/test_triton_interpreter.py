"""The Triton kernels give the answers of the oracles, run by Triton's interpreter on a CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
CHILD = Path(__file__).with_name("interpreted_triton.py")
PATIENCE_S = 400
"""Half a minute of work on an idle machine; a machine that does ten things at once is no failure."""
FEWEST_TESTS = 100
"""Guards against a child that collects nothing."""

triton = pytest.importorskip("triton")
OLD_INTERPRETER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and tuple(
    map(int, np.__version__.split(".")[:2])
) >= (2, 4)


@pytest.mark.interpret
@pytest.mark.timeout(PATIENCE_S + 20)
@pytest.mark.skipif(OLD_INTERPRETER, reason="Triton before 3.7 interprets only with numpy < 2.4")
def test_all_kernels_pass_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHILD)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,  # its output explains a failure better than its status
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= FEWEST_TESTS
    assert "skipped" not in done.stdout
