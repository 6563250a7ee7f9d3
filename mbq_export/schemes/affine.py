"""Real weights to integer codes and back, per row and group of columns.

    lo = min(0, min w)    hi = max(0, max w)          zero is always inside the range
    s  = fp16(max((hi - lo) / L, 2**-14))             rounded once, before any code is chosen
    z  = clamp(rint(-lo / s), 0, L)
    u  = clamp(rint(w / s) + z, 0, L)                 L = 2**bits - 1
    w' = (u - z) * s

Symmetric schemes have no zero points; per channel the scale stays float32, in groups it is rounded to fp16 as above:

    s  = max(max |w|, 1e-5) / P    or    fp16(max(max |w| / P, 2**-14))      P = 2**(bits - 1) - 1
    u  = clamp(rint(w / s), -P - 1, P) + P + 1                                 8 bits: -P .. P

Activations that are rounded too have one scale per token (row), found while the model runs:

    a = max(max |x|, 1e-5)    s = a / P    q = rint(x / s)

Computes in float32 whatever the input; rounding is half to even. The compatible rule of the published MBQ
code (thu-nics/MBQ, ``pseudo_quantize_tensor``) leaves zero out of the range, takes the scale in the tensor's
own dtype and does not round it again: a group that does not straddle zero then saturates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mbq_export.errors import FormatError
from mbq_export.schemes.base import CHANNEL, SMALLEST_SCALE, QuantScheme
from mbq_export.schemes.integers import SMALLEST_ABSMAX, largest_activation

FP16_LARGEST = 65504.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Where the codes of groups lie on the real line.

    Attributes:
        scales: (...) one per group: float16; per channel of a symmetric scheme float32.
        zeros: (...) same shape, floating: the code that stands for 0.
        clamped: Groups whose scale was raised to the smallest allowed.
    """

    scales: Tensor
    zeros: Tensor
    clamped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """Integer codes of one weight and what turns them back into numbers.

    Attributes:
        codes: (N, K) uint8, each in [0, 2**bits).
        scales: (N, G) float16; per channel (N, 1) float32; in compatible mode the weight's dtype.
        zeros: (N, G) uint8; the middle code, which is not stored, where the scheme is symmetric.
        clamped: Groups whose scale was raised to the smallest allowed.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    clamped: int

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return int(self.codes.shape[1] // self.scales.shape[1])


def quantize(
    weight: Tensor, *, scheme: QuantScheme, group_size: int, compat: bool = False
) -> Codes:
    """Round a weight to the nearest code of each group (METHODS 2.1; compatible: 2.5; symmetric: FORMATS 1.3).

    Args:
        weight: (N, K), any floating dtype.
        scheme: Gives the width of a code, and whether there are zero points.
        group_size: Columns that share a scale, or `CHANNEL`; must divide K and be one of the scheme's.
        compat: Use the published rule instead of ours; it is one of asymmetric schemes, others have no second rule.

    Raises:
        UsageError: E2004 if the group size does not divide K or the scheme does not have it.
        FormatError: E4110 for a value that is not finite, E4112 for a range that fp16 cannot hold.
    """
    rows, columns = weight.shape
    grouped = weight.reshape(rows, scheme.groups_of(columns, group_size), -1)
    if not torch.isfinite(grouped).all():
        raise FormatError(
            "E4110",
            f"{int((~torch.isfinite(weight)).sum())} of {weight.numel()} weights are not finite.",
            why="a NaN or infinite weight has no code",
            fix="check the checkpoint: mbq-export inspect MODEL",
        )
    compat = compat and not scheme.symmetric
    # The published rule works in the weight's own dtype, ours in float32.
    exact = grouped if compat else grouped.float()
    if compat:
        grid = _compat_grid(exact, scheme.largest_code)
    else:
        grid = grid_of(exact, scheme=scheme, channel=group_size == CHANNEL)
    return Codes(
        codes=codes_on(exact, grid, scheme=scheme).reshape(rows, columns),
        scales=grid.scales,
        zeros=grid.zeros.to(torch.uint8),
        clamped=grid.clamped,
    )


def grid_of(grouped: Tensor, *, scheme: QuantScheme, channel: bool) -> Grid:
    """Scale and zero point of groups of weights, by our rule.

    Args:
        grouped: (..., size) float32, one group along the last axis.
        scheme: Gives the width of a code, and whether there are zero points.
        channel: Whether a group is a whole row, whose scale stays float32 in a symmetric scheme.

    Raises:
        FormatError: E4112 for a range that fp16 cannot hold.
    """
    if not scheme.symmetric:
        return _grid(grouped, scheme.largest_code)
    scales, clamped = _symmetric_grid(grouped, scheme, channel=channel)
    return Grid(scales=scales, zeros=torch.full_like(scales, scheme.middle), clamped=clamped)


def codes_on(grouped: Tensor, grid: Grid, *, scheme: QuantScheme) -> Tensor:
    """Nearest codes on a grid, whatever it was made of: (..., size) to (..., size) uint8."""
    steps = torch.round(grouped / grid.scales[..., None].to(grouped.dtype))
    moved = steps + grid.zeros[..., None].to(grouped.dtype)
    return moved.clamp(scheme.smallest_code, scheme.largest_code).to(torch.uint8)


def dequantize(codes: Codes) -> Tensor:
    """Turn codes back into (N, K) float32 weights, ``(u - z) * s``."""
    rows, columns = codes.codes.shape
    grouped = codes.codes.reshape(rows, -1, codes.group_size).float()
    real = (grouped - codes.zeros[..., None].float()) * codes.scales[..., None].float()
    return real.reshape(rows, columns)


def quantize_per_token(x: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """Round rows as `integers.quantize_activations` does, which is the reference (FORMATS 1.4).

    Args:
        x: (..., K), any floating dtype.
        bits: Width of a code.

    Returns:
        (..., K) float32 integers in -P .. P, and (..., 1) float32 scales.
    """
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_ABSMAX)
    scales = largest / largest_activation(bits)
    return torch.round(wide / scales), scales


def rounded_per_token(x: Tensor, *, bits: int) -> Tensor:
    """Rows (..., K) as integers times scale, in float32."""
    codes, scales = quantize_per_token(x, bits=bits)
    return codes * scales


def _grid(grouped: Tensor, largest: int) -> Grid:
    low = grouped.amin(-1).clamp(max=0.0)
    high = grouped.amax(-1).clamp(min=0.0)
    step = (high - low) / largest
    _check_fits_fp16(step, steps=largest)
    # Round the scale first: every consumer multiplies by the fp16 value, so the codes must be chosen
    # against it. 1.0 at s = 0.4 is a tie; at fp16(0.4) it is not.
    scales = step.clamp(min=SMALLEST_SCALE).to(torch.float16)
    zeros = torch.round(-low / scales.float()).clamp(0, largest)
    return Grid(scales=scales, zeros=zeros, clamped=int((step < SMALLEST_SCALE).sum()))


def _symmetric_grid(grouped: Tensor, scheme: QuantScheme, *, channel: bool) -> tuple[Tensor, int]:
    absmax = grouped.abs().amax(-1)
    largest = scheme.middle - 1
    if channel:
        return absmax.clamp(min=SMALLEST_ABSMAX) / largest, int((absmax < SMALLEST_ABSMAX).sum())
    step = absmax / largest
    _check_fits_fp16(step, steps=2 * largest)
    return step.clamp(min=SMALLEST_SCALE).to(torch.float16), int((step < SMALLEST_SCALE).sum())


def _check_fits_fp16(step: Tensor, *, steps: int) -> None:
    """Refuse a scale that overflows; a group spans ``steps`` of them."""
    if float(step.max()) > FP16_LARGEST:
        raise FormatError(
            "E4112",
            f"A group spans {float(step.max()) * steps:.3g}.",
            why=f"its scale must fit fp16, so a group may span {FP16_LARGEST * steps:.3g}",
            fix="check the checkpoint: mbq-export inspect MODEL",
        )


def _compat_grid(grouped: Tensor, largest: int) -> Grid:
    low, high = grouped.amin(-1), grouped.amax(-1)
    scales = (high - low).clamp(min=1e-5) / largest
    zeros = (-torch.round(low / scales)).clamp(0, largest)
    return Grid(scales=scales, zeros=zeros, clamped=int(((high - low) < 1e-5).sum()))
