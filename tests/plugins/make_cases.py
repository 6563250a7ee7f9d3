"""Problems with known answers as files for the plugin host: python tests/plugins/make_cases.py FOLDER

Each is drawn from `mbq_kernels.testing`, whose oracle judges the result (`assert_result`), so the plugins are asked the
same questions as the kernels below them.
"""

import sys
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_export.schemes import SCHEMES
from mbq_export.schemes.layouts.tiles import kernel_layout_of
from mbq_kernels.comparison import Family
from mbq_kernels.testing import Case, Epilogue, Kind, Problem, assert_close

OPS: Final = {"w3a16": "W3Linear", "w4a16": "W4A16Linear", "w4a8": "W4A8Linear"}
TYPES: Final = {torch.float16: "half", torch.bfloat16: "bfloat16"}
NUMPY_TYPES: Final = {"float16": "half", "float32": "float", "int32": "int32"}
EPILOGUES: Final = {Epilogue.NONE: 0, Epilogue.SILU_MUL: 1}
LARGEST_SKINNY: Final = 8
"""Rows up to which the choice of kernels is the skinny family; above, the gemm family."""


def cases() -> list[Case]:
    """Every operator in both types, with and without bias, all group sizes, both families, padded N and K."""
    groups = {"w3a16": (32, 64, 128), "w4a16": (128, 64), "w4a8": (0, 128)}
    found = [
        Case(scheme=scheme, dtype=dtype, m=m, n=40, k=256 if group == 128 else 192, group_size=group, bias=bias)
        for scheme in OPS
        for group in groups[scheme]
        for dtype, m, bias in (
            (torch.float16, 1, False),
            (torch.bfloat16, 3, True),
            (torch.float16, 20, True),
        )
    ]  # fmt: skip
    found += [
        Case(scheme=scheme, dtype=torch.bfloat16, m=2, n=64, k=256, group_size=128, bias=True,
             epilogue=Epilogue.SILU_MUL)
        for scheme in OPS
    ]  # fmt: skip
    found += [
        Case(scheme=scheme, dtype=torch.float16, m=2, n=32, k=512, group_size=128, kind=kind)
        for scheme in OPS
        for kind in (Kind.OUTLIERS, Kind.NOT_A_NUMBER, Kind.MIN_CODES)
    ]
    return found


def write_case(problem: Problem, path: Path) -> Path:
    """Write what a plugin is given."""
    case, tiled = problem.case, problem.tiled
    scheme = SCHEMES[case.scheme]
    fields = {
        "N": case.n,
        "K": case.k,
        "group_size": case.group_size,
        "bits": scheme.weight_bits,
        "layout_version": kernel_layout_of(scheme).version,
        "has_bias": int(case.bias),
        "epilogue": EPILOGUES[case.epilogue],
        "act_bits": scheme.act_bits,
    }
    x_shape = (1, case.m, case.k)
    inputs = [(TYPES[case.dtype], x_shape, _bytes(problem.x))]
    inputs += [
        (NUMPY_TYPES[array.dtype.name], array.shape, array.tobytes())
        for array in (tiled.codes, tiled.scales, tiled.zeros)
        if array is not None
    ]
    if problem.packed.bias is not None:
        bias = torch.from_numpy(np.asarray(problem.packed.bias)).to(case.dtype)
        inputs.append((TYPES[case.dtype], (case.n,), _bytes(bias)))
    out = (TYPES[case.dtype], (1, *problem.answer.reference.shape))
    lines = [
        "mbq-case 1",
        f"op {OPS[case.scheme]}",
        *(f"field {name} {value}" for name, value in fields.items()),
        *(f"input {kind} {_sizes(shape)}" for kind, shape, _ in inputs),
        f"output {out[0]} {_sizes(out[1])}",
        "data\n",
    ]
    path.write_bytes("\n".join(lines).encode() + b"".join(data for _, _, data in inputs))
    return path


def assert_result(problem: Problem, raw: bytes) -> None:
    """Judge the bytes that the host wrote.

    Raises:
        AssertionError: See `mbq_kernels.testing.assert_close`.
    """
    case = problem.case
    y = torch.frombuffer(bytearray(raw), dtype=case.dtype).view(problem.answer.reference.shape)
    assert_close(y, problem, family=Family.SKINNY if case.m <= LARGEST_SKINNY else Family.GEMM)


def _bytes(tensor: torch.Tensor) -> bytes:
    raw: NDArray[np.uint8] = tensor.contiguous().view(torch.uint8).numpy()
    return raw.tobytes()


def _sizes(shape: tuple[int, ...]) -> str:
    return " ".join(map(str, (len(shape), *shape)))


if __name__ == "__main__":
    for index, each in enumerate(cases()):
        write_case(each.make(index), Path(sys.argv[1]) / f"{each.name}.case")
