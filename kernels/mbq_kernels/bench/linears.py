"""Our linears and the base they are compared with: cuBLAS, CUDA kernels, Triton kernels, dequantize + cuBLAS."""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own usage)

from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL
from mbq_kernels.bench.emulated import show
from mbq_kernels.bench.entrant import ANY_ROWS, DTYPES, Entrant, Placed, Placing, Setting
from mbq_kernels.bench.gate import (
    dense_rows,
    expected,
    expected_int8,
    float_gate,
    random_weight,
    wrong_answer,
)
from mbq_kernels.bench.limits import FLOAT, HALF_BITS
from mbq_kernels.bench.shapes import Shape
from mbq_kernels.comparison import (
    BF16_ROUNDING,
    FP16_ROUNDING,
    GEMM_BF16_L2,
    Family,
    Tolerance,
    tolerance_for,
)
from mbq_kernels.library import DeviceStruct, LinearCall
from mbq_kernels.weights import DeviceWeight

LIBRARY_FP16_L2: Final = 2e-3
"""cuBLAS may add the parts of a split K in fp16, which torch allows by default."""
SKINNY_ROWS: Final = 8
LEAST_DEQUANT_ROWS: Final = 512
"""From here on multiplying costs more than writing the dequantized weights once."""
FORMATS: Final = (("w3a16", 128), ("w4a16", 128), ("w4a8", CHANNEL), ("w4a8", 128))
MAIN_FORMATS: Final = (("w3a16", 128), ("w4a8", CHANNEL))
SEED: Final = 1


def library_tolerance(dtype: str) -> Tolerance:
    """What a float product of somebody else's library must keep."""
    half = dtype == "float16"
    return Tolerance(
        relative_l2=LIBRARY_FP16_L2 if half else GEMM_BF16_L2,
        relative=FP16_ROUNDING if half else BF16_ROUNDING,
        per_slack=float("inf"),
    )


def contenders(dtype: str) -> tuple[Entrant, ...]:
    """The base of a dtype, then everything of ours in it."""
    ours: list[Entrant] = []
    for scheme, group_size in FORMATS:
        if dtype == "bfloat16" and (scheme, group_size) != FORMATS[0]:
            continue
        ours += [_cuda(scheme, group_size, dtype), _triton(scheme, group_size, dtype)]
    return (_base(dtype), *ours, _dequant("w3a16", 128, dtype), _oracle("w3a16", 128, dtype))


def float_copies(shape: Shape, copies: int, *, dtype: str, device: torch.device) -> list[Tensor]:
    """R copies of one random (N, K) matrix."""
    random = torch.Generator(device).manual_seed(SEED)
    first = torch.empty(shape.n, shape.k, dtype=DTYPES[dtype], device=device)
    first.normal_(std=shape.k**-0.5, generator=random)
    return [first, *(first.clone() for _ in range(copies - 1))]


def _base(dtype: str) -> Entrant:
    def place(shape: Shape, placing: Placing) -> Placed:
        weights = float_copies(shape, placing.copies, dtype=dtype, device=placing.setting.device)
        return Placed(
            weight_bytes=weights[0].nbytes,
            run=lambda copy, x: F.linear(x, weights[copy]),
            wrong=float_gate(lambda: row_blocks(weights[0]), library_tolerance(dtype)),
        )

    return Entrant(
        name=f"cuBLAS {short(dtype)}",
        source="base",
        scheme=FLOAT,
        dtype=dtype,
        group_size=0,
        bits=HALF_BITS,
        int8=False,
        absent=lambda _: "",
        place=place,
        main=dtype == "float16",
    )


def row_blocks(weight: Tensor, rows: int = 4096) -> Iterator[Tensor]:
    """An (N, K) matrix as blocks of rows in float64."""
    return (weight[start : start + rows].double() for start in range(0, len(weight), rows))


def short(dtype: str) -> str:
    """``fp16`` or ``bf16``."""
    return {"float16": "fp16", "bfloat16": "bf16"}[dtype]


def format_name(scheme: str, group_size: int) -> str:
    """``w4a8 channel``, ``w3a16 g128``."""
    return f"{scheme} {'channel' if group_size == CHANNEL else f'g{group_size}'}"


def weight_copies(
    shape: Shape, placing: Placing, *, scheme: str, group_size: int
) -> list[DeviceWeight]:
    """R copies of one random weight."""
    first = random_weight(
        shape, scheme=scheme, group_size=group_size, device=placing.setting.device, seed=SEED
    )
    return [first, *(cloned(first) for _ in range(placing.copies - 1))]


def cloned(weight: DeviceWeight) -> DeviceWeight:
    """The same weight in memory of its own."""
    return replace(
        weight,
        codes=weight.codes.clone(),
        scales=weight.scales.clone(),
        zeros=None if weight.zeros is None else weight.zeros.clone(),
    )


def gate_of(weight: DeviceWeight, *, dtype: str, skinny_is_exact: bool) -> Placed:
    """Size and gate of a weight of ours; `run` is to be replaced.

    Args:
        weight: Copy 0.
        dtype: Of the activations.
        skinny_is_exact: Up to `SKINNY_ROWS` rows no weight is rounded, so the tighter tolerance holds.
    """

    def wrong(y: Tensor, x: Tensor) -> str:
        few = skinny_is_exact and len(x) <= SKINNY_ROWS
        tolerance = tolerance_for(Family.SKINNY if few else Family.GEMM, DTYPES[dtype])
        int8 = SCHEMES[weight.scheme].act_bits == 8
        answer = expected_int8(x, weight) if int8 else expected(x, dense_rows(weight))
        return wrong_answer(y, answer, tolerance)

    return Placed(weight_bytes=weight.nbytes, run=lambda _, x: x, wrong=wrong)


def call_of(weight: DeviceWeight, dtype: str) -> LinearCall:
    """A weight as the kernel library wants it described."""
    return LinearCall(
        scheme=weight.scheme,
        dtype=dtype,
        n=weight.n,
        k=weight.k,
        group_size=weight.group_size,
        codes=weight.codes.data_ptr(),
        scales=weight.scales.data_ptr(),
        zeros=0 if weight.zeros is None else weight.zeros.data_ptr(),
        bias=0 if weight.bias is None else weight.bias.data_ptr(),
    )


def stream_of(device: torch.device) -> int:
    """The current stream as a number; 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def struct_of(setting: Setting) -> DeviceStruct:
    """The device as the kernel library wants it described."""
    machine = setting.machine
    return DeviceStruct(
        sm=machine.sm or 0,
        sm_count=machine.sm_count,
        smem_optin=machine.smem_optin,
        l2_bytes=machine.l2_bytes,
    )


class Outputs:
    """One output per number of rows, NaN until something is written."""

    def __init__(self, n: int) -> None:
        """Outputs of N columns."""
        self._n = n
        self._made: dict[int, Tensor] = {}

    def of(self, x: Tensor) -> Tensor:
        """(M, N) for M rows of x; the same tensor every time, so that it may be written from a graph."""
        m = len(x)
        if m not in self._made:
            self._made[m] = torch.full((m, self._n), torch.nan, dtype=x.dtype, device=x.device)
        return self._made[m]


def scratch_for(call: LinearCall, placing: Placing) -> Tensor:
    """Workspace that suffices for every M that will come."""
    library = placing.setting.library
    assert library is not None, "absent without a library"
    size = library.workspace_bytes(call, max_m=placing.largest_m)
    return torch.empty(size, dtype=torch.uint8, device=placing.setting.device)


def place_cuda(weights: Sequence[DeviceWeight], placing: Placing, *, dtype: str) -> Placed:
    """Ready the kernel library to multiply by copies of a weight."""
    setting, library = placing.setting, placing.setting.library
    assert library is not None, "absent without a library"
    calls = [call_of(weight, dtype) for weight in weights]
    scratch = scratch_for(calls[0], placing)
    outputs = Outputs(weights[0].n)

    def run(copy: int, x: Tensor) -> Tensor:
        y, weight = outputs.of(x), weights[copy]
        show(setting, reads=(x, weight.codes, weight.scales, weight.zeros), writes=(y, scratch))
        library.linear(
            calls[copy],
            m=len(x),
            x=x.data_ptr(),
            y=y.data_ptr(),
            workspace=(scratch.data_ptr(), scratch.nbytes),
            stream=stream_of(setting.device),
        )
        return y

    def config(m: int) -> int | None:
        return (
            library.select_on(calls[0], m=m, device=struct_of(setting)) if setting.on_gpu else None
        )

    return replace(gate_of(weights[0], dtype=dtype, skinny_is_exact=True), run=run, config=config)


def _cuda(scheme: str, group_size: int, dtype: str) -> Entrant:
    def place(shape: Shape, placing: Placing) -> Placed:
        weights = weight_copies(shape, placing, scheme=scheme, group_size=group_size)
        return place_cuda(weights, placing, dtype=dtype)

    return replace(
        _ours(scheme, group_size, dtype),
        name=f"CUDA {format_name(scheme, group_size)}{_suffix(dtype)}",
        source="cuda",
        absent=_without_library,
        place=place,
    )


def _triton(scheme: str, group_size: int, dtype: str) -> Entrant:
    def place(shape: Shape, placing: Placing) -> Placed:
        from mbq_kernels.base import kernel_for  # noqa: PLC0415 (imports Triton, which a CPU may lack)

        run = kernel_for(scheme).run
        weights = weight_copies(shape, placing, scheme=scheme, group_size=group_size)
        outputs = Outputs(shape.n)
        return replace(
            gate_of(weights[0], dtype=dtype, skinny_is_exact=False),
            run=lambda copy, x: run(x, weights[copy], out=outputs.of(x)),
        )

    return replace(
        _ours(scheme, group_size, dtype),
        name=f"Triton {format_name(scheme, group_size)}{_suffix(dtype)}",
        source="triton",
        absent=_without_triton,
        place=place,
    )


def _dequant(scheme: str, group_size: int, dtype: str) -> Entrant:
    def place(shape: Shape, placing: Placing) -> Placed:
        setting, library = placing.setting, placing.setting.library
        assert library is not None, "absent without a library"
        weights = weight_copies(shape, placing, scheme=scheme, group_size=group_size)
        calls = [call_of(weight, dtype) for weight in weights]
        plain = torch.empty(shape.n, shape.k, dtype=DTYPES[dtype], device=setting.device)

        def run(copy: int, x: Tensor) -> Tensor:
            weight = weights[copy]
            show(setting, reads=(weight.codes, weight.scales, weight.zeros), writes=(plain,))
            library.dequant(calls[copy], weights=plain.data_ptr(), stream=stream_of(setting.device))
            return F.linear(x, plain)

        blocks = float_gate(lambda: dense_rows(weights[0]), library_tolerance(dtype))
        return Placed(weight_bytes=weights[0].nbytes, run=run, wrong=blocks)

    return replace(
        _ours(scheme, group_size, dtype),
        name=f"dequantize {scheme} + cuBLAS{_suffix(dtype)}",
        source="cuda",
        absent=_without_library,
        place=place,
        rows=(LEAST_DEQUANT_ROWS, ANY_ROWS),
    )


def _oracle(scheme: str, group_size: int, dtype: str) -> Entrant:
    """Stands in for the kernels in a rehearsal, so that gate and table are exercised without a library."""

    def place(shape: Shape, placing: Placing) -> Placed:
        weights = weight_copies(shape, placing, scheme=scheme, group_size=group_size)
        dense = torch.cat(list(dense_rows(weights[0])))
        return replace(
            gate_of(weights[0], dtype=dtype, skinny_is_exact=True),
            run=lambda _, x: (x.double() @ dense.T).to(x.dtype),
        )

    return replace(
        _ours(scheme, group_size, dtype),
        name=f"oracle {format_name(scheme, group_size)}{_suffix(dtype)}",
        source="oracle",
        absent=lambda setting: "takes part in rehearsals on a CPU only" if setting.on_gpu else "",
        place=place,
    )


def _ours(scheme: str, group_size: int, dtype: str) -> Entrant:
    """What all entrants of a format have in common; name, source, absence and placing are to be replaced."""
    spec = SCHEMES[scheme]
    return replace(
        _base(dtype),
        scheme=scheme,
        group_size=group_size,
        bits=spec.bits_per_weight(group_size),
        int8=spec.act_bits == 8,
        main=dtype == "float16" and (scheme, group_size) in MAIN_FORMATS,
    )


def _without_library(setting: Setting) -> str:
    return "" if setting.library is not None else "the kernel library is not built"


def _without_triton(setting: Setting) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return "" if setting.on_gpu else "Triton compiles for a GPU, there is none"


def _suffix(dtype: str) -> str:
    return "" if dtype == "float16" else f" {short(dtype)}"
