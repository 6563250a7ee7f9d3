"""Compile the Triton kernels for a device that is not there, and read what the compiler used.

``python -m tests.kernels.triton_builds`` writes the table of registers anew.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mbq_kernels.base import SCHEMES_WITH_KERNELS, Build, kernel_for

TABLE = Path(__file__).with_name("triton_registers.json")
CAPABILITIES = (80, 87, 89, 90, 120)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one compiled kernel takes. Stack and local memory mean that registers did not suffice."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int


def usage_of(build: Build, capability: int) -> Usage:
    """Compile, and ask cuobjdump."""
    pointers = [i for i, kind in enumerate(build.signature.values()) if kind.startswith("*")]
    source = ASTSource(
        fn=build.function,
        signature=dict(build.signature),
        constexprs=dict(build.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=dict(build.options)
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        report = subprocess.run(
            [CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report)
    assert found, report
    registers, stack, local = (int(number) for number in found.groups())
    return Usage(
        registers=registers,
        stack_bytes=stack,
        local_bytes=local,
        shared_bytes=int(compiled.metadata.shared),
    )


def write_table(schemes: list[str]) -> None:
    """Measure the schemes named, keep the others."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table["triton"] = triton.__version__
    for scheme in schemes or SCHEMES_WITH_KERNELS:
        table[scheme] = {
            str(capability): {
                build.name: usage_of(build, capability).registers
                for build in kernel_for(scheme).builds(sm=capability)
            }
            for capability in CAPABILITIES
        }
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    write_table(sys.argv[1:])
