"""The attention kernels of a decode step: interpreted, compiled for GPUs that are not there, and on one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from mbq_kernels import decode_attention  # noqa: E402
from mbq_kernels.base import interpreted  # noqa: E402
from tests.kernels.attention_by_hand import RELATIVE, drawn, relative  # noqa: E402
from tests.kernels.test_triton_compile import SHARED_BYTES  # noqa: E402
from tests.kernels.test_triton_interpreter import OLD_INTERPRETER  # noqa: E402
from tests.kernels.triton_builds import CAPABILITIES, CUOBJDUMP, usage_of  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CHILD = Path(__file__).with_name("interpreted_attention.py")
FEWEST_TESTS = 9
"""Guards against a child that collects nothing."""
MOST_REGISTERS = 128
"""Four warps of this many leave room for four blocks on a multiprocessor; 80 are used."""


@pytest.mark.interpret
@pytest.mark.skipif(OLD_INTERPRETER, reason="Triton before 3.7 interprets only with numpy < 2.4")
def test_the_kernels_pass_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHILD)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,  # its output explains a failure better than its status
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= FEWEST_TESTS


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernels_compile_without_spills(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not CUOBJDUMP.exists():
        pytest.skip(f"no {CUOBJDUMP}")
    if interpreted(decode_attention.part_kernel):
        pytest.skip("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for build in decode_attention.builds():
        usage = usage_of(build, capability)
        assert (usage.stack_bytes, usage.local_bytes) == (0, 0), build.name
        assert usage.registers <= MOST_REGISTERS, build.name
        assert usage.shared_bytes <= SHARED_BYTES[capability], build.name


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "fits"),
    [(28, 4, 128, True), (28, 4, 96, False), (4, 4, 8, False), (5, 2, 64, False)],
)
def test_heads_that_do_not_fit_are_known(
    heads: int, kv_heads: int, head_dim: int, *, fits: bool
) -> None:
    found = decode_attention.supports(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    assert found is fits


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("position", [0, 63, 64, 130, 255])
@pytest.mark.parametrize("heads", [(28, 4, 128), (8, 2, 32), (34, 2, 16)], ids=str)
def test_a_token_sees_what_is_not_after_it(
    heads: tuple[int, int, int], position: int, dtype: torch.dtype
) -> None:
    step = drawn(heads, position, dtype=dtype, device="cuda")
    found = decode_attention.attend(*step.arguments)
    assert relative(found, step.answer) <= RELATIVE[dtype]
    assert torch.equal(step.keys[:, position], step.new_key)
    assert torch.equal(step.values[:, position], step.new_value)
    assert torch.equal(decode_attention.attend(*step.arguments), found), "same input, same bits"
