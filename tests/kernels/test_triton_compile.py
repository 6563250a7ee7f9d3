"""Every Triton kernel compiles for every architecture, without spilling and within its registers."""

import json
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from mbq_kernels.base import SCHEMES_WITH_KERNELS, interpreted, kernel_for  # noqa: E402
from mbq_kernels.weight_only import gemv  # noqa: E402
from tests.kernels.triton_builds import CAPABILITIES, CUOBJDUMP, TABLE, usage_of  # noqa: E402

SPARE_REGISTERS = 8
"""How many more than the table a build may take: one step of the allocator."""
SHARED_BYTES = {80: 163 * 1024, 87: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
"""Shared memory a block may have (CUDA C++ Programming Guide, table of compute capabilities)."""


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("scheme", SCHEMES_WITH_KERNELS)
def test_kernels_compile_without_spills_within_their_registers(
    scheme: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not CUOBJDUMP.exists():
        pytest.skip(f"no {CUOBJDUMP}")
    if interpreted(gemv):
        pytest.skip("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    table = json.loads(TABLE.read_text())
    wrong = []
    for build in kernel_for(scheme).builds(sm=capability):
        usage = usage_of(build, capability)
        # Another Triton allocates otherwise; it must not spill either.
        known = table["triton"] == triton.__version__
        allowed = table[scheme][str(capability)][build.name] + SPARE_REGISTERS if known else 255
        spills = usage.stack_bytes or usage.local_bytes
        if spills or usage.registers > allowed or usage.shared_bytes > SHARED_BYTES[capability]:
            wrong.append(f"{build.name}: {usage}, allowed {allowed} registers")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("scheme", SCHEMES_WITH_KERNELS)
def test_the_table_names_exactly_the_builds(scheme: str) -> None:
    table = json.loads(TABLE.read_text())[scheme]
    assert list(map(int, table)) == sorted(CAPABILITIES, key=str)
    for capability, registers in table.items():
        builds = kernel_for(scheme).builds(sm=int(capability))
        assert sorted(registers) == sorted(build.name for build in builds)


@pytest.mark.parametrize("scheme", SCHEMES_WITH_KERNELS)
def test_names_of_builds_are_unique(scheme: str) -> None:
    names = [build.name for build in kernel_for(scheme).builds(sm=90)]
    assert len(set(names)) == len(names)
