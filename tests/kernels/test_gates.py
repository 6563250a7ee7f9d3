"""What nvcc makes of the kernels stays within the budget: no spills, few registers, few instructions per weight."""

import json
import shutil
from typing import Any, Final

import pytest

from tests.kernels.emulated import ROOT
from tests.kernels.scripts import script

gates = script("gates")

BUDGET: Final[dict[str, Any]] = json.loads((ROOT / "kernels/budget.json").read_text())
MOST_PER_WEIGHT: Final = 2.0
"""Warp instructions per weight and lane: 33 to 37 weights per clock and SM of an H100 at full memory speed then take
about 2.1 of its 4 issue slots. Other GPUs have less memory speed per SM and can afford more instructions."""
START_RULE: Final = tuple(f"skinny<WeightOnly<W3, F16, 1>, {shape}>" for shape in ("1, 2", "2, 1"))
"""The W3 kernels for groups of 128 that the start rule picks."""


def code(**changed: Any) -> Any:
    """A kernel within its budget but for what a test changes."""
    values = {
        "registers": 100,
        "stack": 0,
        "local": 0,
        "wide_loads": 4,
        "mma": "HMMA.16816.F32",
        "loop": 480,
        "loop_mma": 32,
    }
    return gates.KernelCode(**(values | changed))


ALLOWED: Final = {"registers": 100, "mma": "HMMA.16816.F32", "loop": 480, "loop_mma": 32}


def test_a_kernel_within_its_budget_passes() -> None:
    assert gates.worse(code(), ALLOWED) == []
    assert gates.worse(code(registers=108), ALLOWED) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"registers": 109}, "109 registers"),
        ({"stack": 8}, "registers spill"),
        ({"local": 2}, "registers spill"),
        ({"loop": 500}, "500 instructions"),
        ({"mma": ""}, "no MMA"),
        ({"mma": "IMMA.16832.S8.S8"}, "IMMA.16832.S8.S8"),
        ({"wide_loads": 0}, "0 wide loads"),
    ],
)
def test_what_got_worse_is_named(changed: dict[str, Any], said: str) -> None:
    assert said in " ".join(gates.worse(code(**changed), ALLOWED))


def test_instructions_are_counted_per_weight() -> None:
    assert code().per_weight == pytest.approx(480 / 4 / 64)
    assert code(mma="IMMA.16832.S8.S8", loop=164, loop_mma=16).per_weight == pytest.approx(
        164 / 4 / 64
    )
    assert code(loop_mma=0).per_weight is None


def test_the_loop_is_the_one_with_the_most_mmas() -> None:
    sass = "\n".join(
        f"        /*{16 * index:04x}*/                   {text} ;"
        for index, text in enumerate(
            [
                "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]",
                "HMMA.16816.F32 R8, R4, R6, RZ",
                "@P0 BRA 0x10",
                "LDS R3, [R2]",
                "@!P1 BRA 0x30",
                "STL [R1], R0",
                "EXIT",
            ]
        )
    )
    found = gates._code(sass, gates.KernelUse(registers=40, spilled=0))
    assert (found.loop, found.loop_mma, found.local, found.wide_loads) == (2, 1, 1, 1)
    assert found.mma == "HMMA.16816.F32"


def test_the_budget_itself_holds_no_spills_and_keeps_to_the_instruction_limit() -> None:
    kernels = BUDGET["kernels"]
    assert set(next(iter(kernels.values()))) == {str(sm) for sm in gates.SMS}
    for name, each in kernels.items():
        for sm, values in each.items():
            found = gates.KernelCode(**values)
            assert (found.stack, found.local) == (0, 0), (name, sm)
            if name in START_RULE and sm == "90":
                assert found.per_weight <= MOST_PER_WEIGHT, (name, sm, found.per_weight)


@pytest.mark.nvcc
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("sm", gates.SMS)
def test_compiled_kernels_keep_to_the_budget(sm: int, capsys: pytest.CaptureFixture[str]) -> None:
    status = gates.main(["--sm", str(sm)])
    assert status == 0, capsys.readouterr().out
