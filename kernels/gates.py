"""Look at what the compiler made of the kernels: registers, spills, loads, instructions of the inner loop.

    python kernels/gates.py                  compare with kernels/budget.json; exit status 1 if something got worse
    python kernels/gates.py --sm 90 --write  measure and write the budget

Needs nvcc and cuobjdump, no GPU. Instructions per weight and lane are the best stand-in for speed that a machine
without a GPU has: a warp must issue them for every 32 weights, however fast the memory is.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from build import Plan, compiled
from mbq_export import native
from mbq_export.errors import MachineError, MbqError
from mbq_export.plugin_library.machine_code import KernelUse, find_cuobjdump, short_name, usage
from mbq_export.writing import write_file

SMS: Final = (80, 87, 89, 90, 110, 120)
BUDGET: Final = HERE / "budget.json"
REGISTER_SLACK: Final = 8
"""Another patch release of the compiler may move a few registers; more is a change of ours."""

INSTRUCTION_SLACK: Final = 1.02
TILE_WEIGHTS_PER_LANE: Final = 64
MMA_PER_TILE: Final = {"HMMA": 8, "IMMA": 4}
TOOL_SECONDS: Final = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelCode:
    """One kernel as compiled for one architecture.

    Attributes:
        registers: Per thread.
        stack: Bytes of stack and local memory per thread; spills end up here.
        local: Loads and stores of local memory in its code.
        wide_loads: Loads of 128 bits from global memory, copies to shared memory included.
        mma: Tensor-core instruction in its code, or "".
        loop: Instructions between two arrivals at the head of the loop with the most MMAs; 0 if it has none.
        loop_mma: MMAs among them.
    """

    registers: int
    stack: int
    local: int
    wide_loads: int
    mma: str
    loop: int
    loop_mma: int

    @property
    def per_weight(self) -> float | None:
        """Warp instructions per weight and lane in the loop of a skinny kernel."""
        if not self.loop_mma:
            return None
        tiles = self.loop_mma / MMA_PER_TILE[self.mma.partition(".")[0]]
        return self.loop / tiles / TILE_WEIGHTS_PER_LANE


def cuobjdump() -> Path:
    """Find the tool that reads device code: PATH, or the packages that carry it.

    Raises:
        MachineError: E3017.
    """
    found = find_cuobjdump()
    if found is None:
        raise MachineError(
            "E3017",
            "cuobjdump is not on the PATH.",
            why="it reads what nvcc compiled",
            fix="pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
        )
    return found


def measure(sm: int, objects: Path) -> dict[str, KernelCode]:
    """Compile every unit for one architecture and read its device code; kernels by name.

    Raises:
        MachineError: E3017 without nvcc or cuobjdump.
        BuildError: E6013 if nvcc fails.
    """
    plan = Plan(sms=(sm,), ptx=False)
    return {
        name: code
        for cubin in compiled(plan, ["-cubin"], suffix=".cubin", objects=objects)
        for name, code in _read(cubin)
    }


def worse(found: KernelCode, allowed: dict[str, Any]) -> list[str]:
    """Say in which ways a kernel breaks a rule or exceeds its budget."""
    said = []
    if found.stack or found.local:
        said.append(f"{found.stack} bytes of stack, {found.local} local accesses: registers spill")
    if found.registers > allowed["registers"] + REGISTER_SLACK:
        said.append(f"{found.registers} registers, the budget is {allowed['registers']}")
    if found.loop > allowed["loop"] * INSTRUCTION_SLACK * max(found.loop_mma, 1) / max(
        allowed["loop_mma"], 1
    ):
        said.append(
            f"{found.loop} instructions for {found.loop_mma} MMAs, the budget is {allowed['loop']}"
        )
    if found.mma != allowed["mma"] or (found.mma and not found.wide_loads):
        said.append(
            f"{found.mma or 'no MMA'} with {found.wide_loads} wide loads, the budget has {allowed['mma']}"
        )
    return said


def _read(cubin: Path) -> Iterator[tuple[str, KernelCode]]:
    used = _output([str(cuobjdump()), "-res-usage", str(cubin)], cubin.with_suffix(".usage"))
    sass = _output([str(cuobjdump()), "-sass", str(cubin)], cubin.with_suffix(".sass"))
    resources = usage(used)
    functions = re.split(r"\n\s*Function : ", sass)[1:]
    mangled = [text.partition("\n")[0].strip() for text in functions]
    names = (
        _output(["c++filt", *mangled], cubin.with_suffix(".names")).splitlines() if mangled else []
    )
    for symbol, name, text in zip(mangled, names, functions, strict=True):
        yield short_name(name), _code(text, resources[symbol])


def _code(sass: str, use: KernelUse) -> KernelCode:
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    words = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for _, text in lines]
    at = {int(address, 16): index for index, (address, _) in enumerate(lines)}
    loops = []
    for index, (address, text) in enumerate(lines):
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < int(address, 16):
            body = words[at[int(target[1], 16)] : index + 1]
            loops.append((sum(_is_mma(word) for word in body), -len(body), body))
    mma = Counter(word for word in words if _is_mma(word)).most_common(1)
    most, _, body = max(loops, default=(0, 0, []))
    return KernelCode(
        registers=use.registers,
        stack=use.spilled,
        local=sum(word.startswith(("LDL", "STL")) for word in words),
        wide_loads=sum(word.startswith(("LDG", "LDGSTS")) and ".128" in word for word in words),
        mma=mma[0][0] if mma else "",
        loop=len(body) if most else 0,
        loop_mma=most,
    )


def _is_mma(word: str) -> bool:
    return word.startswith(("HMMA", "IMMA"))


def _output(command: Sequence[str], log: Path) -> str:
    result = native.run_child(command, log=log, timeout_s=TOOL_SECONDS)
    text = log.read_text()
    log.unlink()
    if not result.ok:
        raise MachineError("E3017", f"{command[0]} failed.", why=text[-300:], fix="reinstall it")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, then compare or write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sm", type=int, action="append", help="architecture; repeatable")
    parser.add_argument("--write", action="store_true", help="write kernels/budget.json")
    parser.add_argument("--objects", type=Path, default=HERE.parent / "build" / "objects")
    asked = parser.parse_args(argv)
    try:
        found = {sm: measure(sm, asked.objects) for sm in asked.sm or SMS}
    except MbqError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    if asked.write:
        write_budget(found)
        return 0
    budget = json.loads(BUDGET.read_text())["kernels"]
    said = [
        f"sm_{sm} {name}: {line}"
        for sm, kernels in found.items()
        for name, code in kernels.items()
        for line in (
            worse(code, budget[name][str(sm)]) if name in budget else ["not in the budget"]
        )
    ]
    print("\n".join(said) or f"{sum(map(len, found.values()))} kernels are within their budget")
    return 1 if said else 0


def write_budget(found: dict[int, dict[str, KernelCode]]) -> None:
    """Write what was measured, kernels by name, architectures within."""
    kernels: dict[str, dict[str, Any]] = {}
    for sm, codes in found.items():
        for name, code in codes.items():
            kernels.setdefault(name, {})[str(sm)] = asdict(code)
    version = _output(["nvcc", "--version"], HERE.parent / "build" / "nvcc.version")
    release = re.search(r"V(\d[\d.]*)", version)
    content = {"nvcc": release[1] if release else "", "kernels": dict(sorted(kernels.items()))}
    write_file(BUDGET, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
