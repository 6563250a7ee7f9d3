"""Make `kernel-code.md` from `kernels/budget.json`: what nvcc makes of the decode and prefill kernels.

python kernels/gates.py --write && python -m docs.benchmarks.kernel_code
"""

import json
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
BUDGET: Final = HERE.parents[1] / "kernels" / "budget.json"
PAGE: Final = HERE / "kernel-code.md"
MMA_PER_TILE: Final = {"HMMA": 8, "IMMA": 4}
TILE_WEIGHTS_PER_LANE: Final = 64
LIMIT: Final = 2.0

HEAD: Final = """# Kernels as compiled: registers and instructions

Made by `python -m docs.benchmarks.kernel_code` from [kernels/budget.json](../../kernels/budget.json), which
`python kernels/gates.py --write` reads out of device code of nvcc {nvcc}; tests hold page, budget and compiler together.
No GPU is involved, and nothing here is a time.

A warp multiplies a tile of 16 x 128 weights as 64 weights per lane. The number that matters for decode is warp
instructions per weight and lane: at full memory speed an SM of an H100 must take in 33 to 37 weights per clock, about
2.1 of its 4 issue slots at the budget of {limit} for W3 in groups of 128. The count is that of the loop body, its branches
included.
"""

SKINNY: Final = """
## Decode (M <= 8): instructions per weight and lane, registers

| kernel | tiles per warp, prefetched | {heads} |
|---|---|{rules}|
{rows}

{verdict}
"""

GEMM: Final = """
## Prefill: instructions per MMA in the main loop, registers

| kernel | tiles x warps x depth x tokens | {heads} |
|---|---|{rules}|
{rows}

No kernel of either family uses a stack or local memory on any of these architectures: nothing spills.
"""


def page(budget: dict[str, Any]) -> str:
    """The whole page."""
    kernels = budget["kernels"]
    sms = sorted({sm for each in kernels.values() for sm in each}, key=int)
    heads, rules = " | ".join(f"sm_{sm}" for sm in sms), "|".join("---" for _ in sms)
    skinny = [name for name in kernels if name.startswith("skinny<")]
    gemm = [name for name in kernels if name.startswith("gemm_kernel<")]
    text = HEAD.format(nvcc=budget["nvcc"], limit=LIMIT)
    text += SKINNY.format(
        heads=heads,
        rules=rules,
        rows="\n".join(_row(_skinny_name(n), kernels[n], sms, _per_weight) for n in skinny),
        verdict=_verdict({name: kernels[name] for name in skinny}),
    )
    return text + GEMM.format(
        heads=heads,
        rules=rules,
        rows="\n".join(_row(_gemm_name(n), kernels[n], sms, _per_mma) for n in gemm),
    )


def _row(name: str, codes: dict[str, Any], sms: list[str], figure: Any) -> str:
    cells = (
        f"{figure(codes[sm]):.2f}, {codes[sm]['registers']}" if sm in codes else "" for sm in sms
    )
    return f"| {name} | {' | '.join(cells)} |"


def _per_weight(code: dict[str, Any]) -> float:
    tiles = code["loop_mma"] / MMA_PER_TILE[code["mma"].partition(".")[0]]
    return float(code["loop"] / tiles / TILE_WEIGHTS_PER_LANE)


def _per_mma(code: dict[str, Any]) -> float:
    return float(code["loop"] / code["loop_mma"])


def _skinny_name(name: str) -> str:
    """``W3 F16, group 128 | 1, 2`` of ``skinny<WeightOnly<W3, F16, 1>, 1, 2>``."""
    inner, _, shape = name.removeprefix("skinny<").removesuffix(">").rpartition(">, ")
    kind, _, rest = inner.partition("<")
    words = rest.split(", ")
    if kind == "Int8":
        return f"W4A8 {words[0]}, {'group 128' if words[1] == 'true' else 'per channel'} | {shape}"
    return f"{words[0]} {words[1]}, group {128 // int(words[2])} | {shape}"


def _gemm_name(name: str) -> str:
    """``W3 F16 | 4 x 4 x 4 x 16`` of ``gemm_kernel<gemm::Block<gemm::Float<W3, F16, 1u>, 4, 4, 4, 16>, 4>``."""
    block = name.removeprefix("gemm_kernel<gemm::Block<gemm::").rpartition(">, ")[0]
    inner, _, shape = block.rpartition(">, ")
    kind, _, rest = inner.partition("<")
    words = rest.split(", ")
    if kind == "Int8":
        what = f"W4A8 {words[0]}, {'group 128' if words[1] == 'true' else 'per channel'}"
    else:
        what = f"{words[0]} {words[1]}"
    return f"{what} | {shape.replace(', ', ' x ')}"


def _verdict(kernels: dict[str, dict[str, Any]]) -> str:
    over = sorted(
        f"{_skinny_name(name).replace(' | ', ' as ')} on sm_{sm} ({_per_weight(code):.2f})"
        for name, codes in kernels.items()
        if "W3" in name and "group 128" in _skinny_name(name)
        for sm, code in codes.items()
        if _per_weight(code) > LIMIT
    )
    if not over:
        return f"Every W3 kernel for groups of 128 keeps to the budget of {LIMIT}."
    return f"Over the budget of {LIMIT} for W3 in groups of 128: {'; '.join(over)}."


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(BUDGET.read_text())))
