"""What the tests of the operators share: problems as arguments."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mbq_kernels import ops
from mbq_kernels.cases import adversarial_cases, epilogue_cases
from mbq_kernels.testing import Case, Epilogue, Problem
from mbq_kernels.weights import DeviceWeight, device_weight

SCHEMES = ("w3a16", "w4a16", "w4a8")
SMALL = Case(
    scheme="w3a16", dtype=torch.float16, m=3, n=64, k=256, group_size=128, bias=True, residual=True
)
SKINNY_ROWS = 8
"""Up to here the library multiplies by integers; above it rounds weights once."""


def weight_of(problem: Problem, device: str = "cpu") -> DeviceWeight:
    return device_weight(problem.tiled, dtype=problem.case.dtype, device=device)


def name_of(epilogue: Epilogue) -> str:
    return epilogue.value.replace("-", "_")


def answer(problem: Problem, device: str = "cpu") -> Tensor:
    return ops.apply(
        weight_of(problem, device),
        problem.x_on(device),
        residual=None if problem.residual is None else problem.residual.to(device),
        epilogue=name_of(problem.case.epilogue),
    )


def arguments(problem: Problem, **changes: Any) -> dict[str, Any]:
    weight = weight_of(problem)
    return {
        "x": problem.x,
        "codes": weight.codes,
        "scales": weight.scales,
        "zeros": weight.zeros,
        "bias": weight.bias,
        "residual": problem.residual,
        "scheme": weight.scheme,
        "n": weight.n,
        "k": weight.k,
        "group_size": weight.group_size,
        "epilogue": "none",
    } | changes


def all_cases(scheme: str, dtype: torch.dtype) -> Iterator[Case]:
    yield from adversarial_cases(scheme, dtype)
    yield from epilogue_cases(scheme, dtype)
