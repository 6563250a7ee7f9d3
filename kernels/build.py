"""Compile the kernel library from a checkout.

    python kernels/build.py                   build/libmbq_kernels.so for the usual GPUs (needs nvcc)
    python kernels/build.py --sm 90           only for an H100
    python kernels/build.py --emulated        build/libmbq_emulated.so: the same sources on a CPU (needs g++)

Objects are kept in build/objects under a hash of everything they were made from; what has not changed is not
compiled again.
"""

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from mbq_export import native  # a checkout need not be installed
from mbq_export.errors import BuildError, MachineError, MbqError

USUAL_SMS: Final = (80, 86, 87, 89, 90, 110, 120)
COMPILE_SECONDS: Final = 1200.0
INCLUDES: Final = ("include", "src")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One library to make.

    Attributes:
        emulated: g++ and fibres instead of nvcc and a GPU.
        sms: Architectures to compile for.
        ptx: Add the newest of them as PTX, for GPUs newer still.
        defines: Extra macros, for example ``MBQ_MUTANT=1``.
        define_in: Stems of the sources that get them; empty for all.
        extra: Extra flags of the compiler, for example ``-fsanitize=address``.
    """

    emulated: bool = False
    sms: tuple[int, ...] = USUAL_SMS
    ptx: bool = True
    defines: tuple[str, ...] = ()
    define_in: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def folders(self) -> list[Path]:
        """Where headers are looked for."""
        return [HERE / name for name in (*INCLUDES, *(["emulation"] if self.emulated else []))]

    @property
    def compiler(self) -> str:
        """Program to call.

        Raises:
            MachineError: E3017 if it is not on the PATH.
        """
        name = "g++" if self.emulated else "nvcc"
        found = shutil.which(name)
        if found is None:
            raise MachineError(
                "E3017",
                f"{name} is not on the PATH.",
                why="the kernel library is compiled from sources",
                fix="install g++ 12 or newer"
                if self.emulated
                else "install the CUDA toolkit, 12.6 or newer",
            )
        return found

    def sources(self) -> list[Path]:
        """Translation units, in a fixed order."""
        emulation = sorted((HERE / "emulation").glob("*.cpp")) if self.emulated else []
        return sorted((HERE / "src").glob("*.cu")) + emulation

    def flags(self, unit: Path) -> list[str]:
        """Flags that one source is compiled with."""
        macros = self.defines if not self.define_in or unit.stem in self.define_in else ()
        common = ["-std=c++17", "-O2", *(f"-D{name}" for name in macros), *self.extra]
        common += [f"-I{folder}" for folder in self.folders]
        if self.emulated:
            # No contraction: the emulation rounds where the device rounds.
            return [
                *common,
                "-DMBQ_EMULATION",
                "-fPIC",
                "-ffp-contract=off",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-x",
                "c++",
            ]
        images = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in self.sms]
        if self.ptx:
            images.append(f"-gencode=arch=compute_{max(self.sms)},code=compute_{max(self.sms)}")
        return [*common, "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", *images]


def build(plan: Plan, out: Path, *, jobs: int = 0) -> Path:
    """Compile and link a library; nothing is compiled that has not changed.

    Raises:
        MachineError: E3017 without a compiler.
        BuildError: E6013 if a compiler fails.
    """
    made = compiled(plan, ["-c"], suffix=".o", objects=out.parent / "objects", jobs=jobs)
    runtime = [] if plan.emulated else ["-cudart", "static"]
    _compile([plan.compiler, "-shared", *plan.extra, *runtime, *map(str, made)], out)
    return out


def compiled(
    plan: Plan, mode: Sequence[str], *, suffix: str, objects: Path, jobs: int = 0
) -> list[Path]:
    """Compile every translation unit, several at once; what is there already is left alone.

    Args:
        plan: What for.
        mode: What to make: ``["-c"]`` an object, ``["-cubin"]`` device code of one architecture.
        suffix: Of the files made.
        objects: Folder of the files made; their names hold a hash of all they come from.
        jobs: Compilers at once; 0 is one per core.

    Raises:
        MachineError: E3017 without a compiler.
        BuildError: E6013 if a compiler fails.
    """
    objects.mkdir(parents=True, exist_ok=True)
    headers = sorted(
        path
        for folder in plan.folders
        for path in folder.rglob("*")
        if path.suffix in {".h", ".cuh", ".inc"}
    )
    shared = _hash(headers, [])
    commands = [[plan.compiler, *plan.flags(unit), *mode, str(unit)] for unit in plan.sources()]
    made = [
        objects / f"{unit.stem}-{_hash([unit], [shared, *command])[:20]}{suffix}"
        for unit, command in zip(plan.sources(), commands, strict=True)
    ]
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        todo = [(c, out) for c, out in zip(commands, made, strict=True) if not out.is_file()]
        for done in [pool.submit(_compile, command, out) for command, out in todo]:
            done.result()
    return made


def _compile(command: Sequence[str], out: Path) -> None:
    """Run a compiler with its output beside its place, renamed at the end."""
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    log = out.with_name(f"{out.name}.{os.getpid()}.log")
    # The output comes before -x and its language, which would claim it as a source.
    result = native.run_child(
        [command[0], "-o", str(partial), *command[1:]], log=log, timeout_s=COMPILE_SECONDS
    )
    if not result.ok:
        raise BuildError(
            "E6013",
            f"{Path(command[0]).name} failed on {Path(command[-1]).name}.",
            why="\n".join(result.tail(12)),
            fix=f"see {log}",
        )
    log.unlink(missing_ok=True)
    partial.replace(out)


def _hash(files: Sequence[Path], words: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    digest.update("\0".join(words).encode())
    return digest.hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, build, print the library's path."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--emulated", action="store_true", help="the same sources on a CPU")
    parser.add_argument("--sm", type=int, action="append", help="architecture; repeatable")
    parser.add_argument(
        "--define", action="append", default=[], help="extra macro NAME=VALUE; repeatable"
    )
    parser.add_argument(
        "--define-in",
        action="append",
        default=[],
        help="stem of a source that gets them; repeatable",
    )
    parser.add_argument(
        "--flag", action="append", default=[], help="extra compiler flag; repeatable"
    )
    parser.add_argument("--jobs", type=int, default=0, help="compilers at once; 0 is one per core")
    parser.add_argument("-o", "--out", type=Path, help="library to write")
    asked = parser.parse_args(argv)
    plan = Plan(
        emulated=asked.emulated,
        sms=tuple(sorted(asked.sm)) if asked.sm else USUAL_SMS,
        defines=tuple(asked.define),
        define_in=tuple(asked.define_in),
        extra=tuple(asked.flag),
    )
    name = "libmbq_emulated.so" if plan.emulated else "libmbq_kernels.so"
    try:
        print(build(plan, asked.out or HERE.parent / "build" / name, jobs=asked.jobs))
    except MbqError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
