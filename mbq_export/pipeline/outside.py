"""What a plan quantizes outside of the decoder's blocks: the output head, and the vision tower."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mbq_export.errors import UsageError
from mbq_export.quantize.head import KEPT_BITS, HeadFormat, head_format
from mbq_export.quantize.tower import tower_scheme
from mbq_export.schemes.base import group_name

if TYPE_CHECKING:
    from mbq_export.families.base import TextShape
    from mbq_export.pipeline.request import BuildRequest
    from mbq_export.schemes.base import QuantScheme

SMALLEST_BITS = 4


def head_of(
    request: BuildRequest, text: TextShape, scheme: QuantScheme | None
) -> HeadFormat | None:
    """The format that was asked for; None where the head stays as it is.

    Raises:
        UsageError: E2001 for an unknown width, E2002 without a scheme for the blocks, E2004 if no group fits.
    """
    form = head_format(request.lm_head_bits, text.hidden)
    if form is not None and scheme is None:
        raise UsageError(
            "E2002",
            f"--lm-head-bits {request.lm_head_bits} contradicts --wbits 16.",
            why="the unquantized baseline has no codes, nor has its head",
            fix=("--lm-head-bits 16", "--wbits 3"),
        )
    return form


def tower_of(request: BuildRequest, scheme: QuantScheme | None) -> QuantScheme | None:
    """The format of the vision tower that was asked for; None where it stays as it is.

    Raises:
        UsageError: E2001 for an unknown width, E2002 without a scheme for the decoder.
    """
    found = tower_scheme(request.vision_bits)
    if found is not None and scheme is None:
        raise UsageError(
            "E2002",
            f"--vision-bits {request.vision_bits} contradicts --wbits 16.",
            why="the unquantized baseline has no codes, nor has its tower",
            fix=("--vision-bits 16", "--wbits 3"),
        )
    return found


def outside_facts(request: BuildRequest) -> dict[str, int]:
    """What a fingerprint says of both: nothing of what stays as it is."""
    bits = {"lm_head_bits": request.lm_head_bits, "vision_bits": request.vision_bits}
    return {name: each for name, each in bits.items() if each != KEPT_BITS}


def tower_row(scheme: QuantScheme | None) -> tuple[str, int, str, str]:
    """A row of the table of what is quantized for the vision tower."""
    if scheme is None:
        return ("vision tower, projector", 1, str(KEPT_BITS), "policy: small, and sensitive")
    return (
        "vision tower",
        1,
        f"{scheme.bits_per_weight(scheme.group_size):.3f}",
        f"{scheme.name} channel, smoothed; embeddings and projector stay in 16",
    )


def head_row(
    form: HeadFormat | None, text: TextShape, *, block_bits: float
) -> tuple[str, int, str, str]:
    """A row of the table of what is quantized: module group, count, bits, reason.

    Args:
        form: Format of the head.
        text: Decoder sizes.
        block_bits: Bits of all linears in the blocks.
    """
    weights = text.vocab * text.hidden
    whole = weights * KEPT_BITS
    if form is None:
        small = head_format(SMALLEST_BITS, text.hidden)
        assert small is not None  # a width with a scheme
        few = weights * small.scheme.bits_per_weight(small.group_size)
        gain = (
            f"{whole / (whole + block_bits):.0%} of a token's bytes, "
            f"{few / (few + block_bits):.0%} with --lm-head-bits {SMALLEST_BITS}"
        )
        return ("head", 1, str(KEPT_BITS), f"policy: {gain}")
    bits = form.scheme.bits_per_weight(form.group_size)
    mib = weights * bits / 8 / (1 << 20)
    size = (
        f"+ {mib:.3g} MiB, no longer the embedding"
        if text.tied_head
        else f"{mib:.3g} MiB instead of {whole / 8 / (1 << 20):.3g}"
    )
    return ("head", 1, f"{bits:.3f}", f"{form.scheme.name} {group_name(form.group_size)}, {size}")
