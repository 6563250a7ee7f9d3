"""The output head as codes of its own, rounded for the positions whose logits decide an answer.

    rows   = final norm's output where the next token is an answer's
    H      = sum of x x' over rows behind quantized blocks          error feedback as in `gptq`
    KL     = mean over rows of full precision of  KL(softmax(W x) || softmax(W^ x))

The last is what the head alone does to answers: everything before it in full precision. Rows of W do not know each
other, so a large vocabulary is rounded and compared some rows at a time. There is no channel scale in front of the
head: the final norm would have to take it.

A head that was tied to the embedding becomes a tensor of its own; the embedding stays as it is.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from mbq_export.errors import UsageError, located
from mbq_export.families.base import ANSWER
from mbq_export.quantize.apply import ERROR_DIGITS, QuantizedBlock, note_zeros, packed_tensors
from mbq_export.quantize.gptq import Factor, factorise, round_linear, weighted_square
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.affine import Codes, dequantize, quantize
from mbq_export.schemes.base import CHANNEL, GROUP_SIZES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mbq_export.blocks.stream import BlockStream
    from mbq_export.families.base import LoadedModel
    from mbq_export.families.inputs import ModelInputs
    from mbq_export.quantize.feedback import Feedback, Samples
    from mbq_export.quantize.streams import Pairs
    from mbq_export.schemes.base import QuantScheme

logger = logging.getLogger(__name__)

KEPT_BITS: Final = 16
SCHEME_BY_BITS: Final = {8: "w8a16", 4: "w4a16"}
ROWS_AT_ONCE: Final = 16384
"""Rows of the head in memory in float64: 470 MB each at 3584 columns."""
LIMIT_NATS: Final = 0.002
"""What a rounded head may add to the divergence at answers: small beside the 0.01 or so of 3-bit blocks (METHODS 13)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadFormat:
    """Number format of the output head.

    Attributes:
        scheme: Weight-only.
        group_size: Columns that share a scale, or `CHANNEL`.
    """

    scheme: QuantScheme
    group_size: int


def head_format(bits: int, columns: int) -> HeadFormat | None:
    """The format of a head: 8 bits per channel, or 4 in the largest groups that divide its columns.

    Args:
        bits: 16, 8 or 4.
        columns: K.

    Returns:
        None for 16: the head stays as it is.

    Raises:
        UsageError: E2001 for another width, E2004 if no group divides the columns.
    """
    if bits == KEPT_BITS:
        return None
    if bits not in SCHEME_BY_BITS:
        raise UsageError(
            "E2001",
            f"Unknown --lm-head-bits {bits}.",
            why=f"known: {KEPT_BITS}, {', '.join(map(str, SCHEME_BY_BITS))}",
            fix="--lm-head-bits 4",
        )
    scheme = SCHEMES[SCHEME_BY_BITS[bits]]
    if CHANNEL in scheme.group_sizes:
        group_size = CHANNEL
    else:
        group_size = max(
            (size for size in GROUP_SIZES if columns % size == 0), default=GROUP_SIZES[0]
        )
    scheme.check_columns(columns, group_size)
    return HeadFormat(scheme=scheme, group_size=group_size)


@dataclass(frozen=True, kw_only=True)
class HeadRows:
    """What a head is rounded for and judged by.

    Attributes:
        read: (M, K) what it reads behind quantized blocks; None rounds each weight to the nearest code.
        exact: (M', K) what it reads in full precision, of other samples if there are any; None leaves the
            divergence unmeasured.
        damp: Share of its mean diagonal that the Hessian is damped with.
    """

    read: Tensor | None
    exact: Tensor | None
    damp: float


def finished_head(
    model: LoadedModel,
    stream: BlockStream,
    form: HeadFormat,
    *,
    feedback: Feedback | None,
    samples: Samples | None,
) -> QuantizedBlock:
    """Round the head behind blocks that are all finished.

    Args:
        model: Decoder blocks may be on the meta device.
        stream: Its blocks.
        form: Number format.
        feedback: Has passed all blocks; None rounds to the nearest codes.
        samples: The held-out ones say what the head costs answers, else all; None leaves that open.

    Raises:
        GateError: E1103 or E1110 for inputs that cannot be used.
        FormatError: E4110 or E4112.
    """
    judged = () if samples is None else samples.held_out or samples.inputs
    rows = HeadRows(
        read=None if feedback is None else answer_rows(model, feedback.behind),
        exact=answer_rows(model, exact_pairs(stream, judged)) if judged else None,
        damp=0.0 if feedback is None else feedback.damp,
    )
    return quantize_head(model, form, rows)


def quantize_head(model: LoadedModel, form: HeadFormat, rows: HeadRows) -> QuantizedBlock:
    """Round and pack the head.

    Args:
        model: With its head in memory.
        form: Number format.
        rows: Of `answer_rows`.

    Raises:
        GateError: E1103 or E1110 for inputs that cannot be used.
        FormatError: E4110 or E4112.
    """
    name = model.family.head
    with located(name):
        weight = model.module.get_submodule(name).get_parameter("weight").detach()
        codes, facts = _rounded(weight, form, rows)
        note_zeros(name, weight, codes)
        nats = None if rows.exact is None else divergence(rows.exact, weight, codes)
    row = {
        "name": name,
        "n": weight.shape[0],
        "k": weight.shape[1],
        "scheme": form.scheme.name,
        "group_size": form.group_size,
        "bias": False,
        "alpha": None,
        "error": {"weight": _relative_error(weight, codes)},
        "clamped_scales": codes.clamped,
        **facts,
        "kl": {
            "answers": None if nats is None else _short(nats),
            "positions": 0 if rows.exact is None else len(rows.exact),
            "limit": LIMIT_NATS,
        },
    }
    return QuantizedBlock(
        tensors=packed_tensors(name, codes, form.scheme), linears=(row,), sha256=""
    )


def warn_of(row: Mapping[str, Any]) -> None:
    """Say when the head alone moves answers more than it may (W1120), or that nobody looked (W1121).

    Args:
        row: Of the head in `mbq.json`.
    """
    found, bits = row["kl"]["answers"], SCHEMES[row["scheme"]].weight_bits
    if found is None:
        logger.warning(
            "MBQ-W1121: --lm-head-bits %d: what it costs answers was not measured, for want of samples",
            bits,
        )
    elif found > LIMIT_NATS:
        logger.warning(
            "MBQ-W1120: --lm-head-bits %d alone adds %.2g nats at answers, more than %g: "
            "--lm-head-bits %d",
            bits,
            found,
            LIMIT_NATS,
            min(KEPT_BITS, 2 * bits),
        )


def answer_rows(model: LoadedModel, pairs: Pairs) -> Tensor:
    """What the head reads where the next token is an answer's.

    Args:
        model: Gives the final norm.
        pairs: Batches with the rows (B, T, hidden) behind the last block.

    Returns:
        (M, hidden) float32.
    """
    norm = model.module.get_submodule(model.family.final_norm)
    found = []
    with torch.no_grad():
        for batch, hidden in pairs:
            predicts = batch.classes[:, 1:] == ANSWER
            found.append(norm(hidden[:, :-1][predicts]).float())
    return torch.cat(found)


def exact_pairs(stream: BlockStream, inputs: Sequence[ModelInputs]) -> Pairs:
    """Samples behind the last block of the full-precision model."""
    batches = stream.begin(inputs)
    pairs = [(batch, batch.hidden) for batch in batches]
    for index in range(len(stream)):
        with stream.block(index) as block:
            pairs = list(zip(batches, stream.run_all(block, index, pairs), strict=True))
    return pairs


def divergence(rows: Tensor, weight: Tensor, codes: Codes) -> float:
    """Mean KL from the logits of a weight to those of its codes, in nats.

    Args:
        rows: (M, K).
        weight: (V, K), any floating dtype.
        codes: Of the weight.
    """
    total = size = other = torch.zeros(0)
    for part in _parts(len(weight)):
        exact = (rows @ weight[part].float().T).double()
        moved = (rows @ dequantize(_slice(codes, part)).T).double()
        here = exact.logsumexp(1)
        mean = ((exact - here[:, None]).exp() * (exact - moved)).sum(1)
        there = moved.logsumexp(1)
        if part.start == 0:
            total, size, other = mean, here, there
            continue
        both = torch.logaddexp(size, here)
        total = total * (size - both).exp() + mean * (here - both).exp()
        size, other = both, torch.logaddexp(other, there)
    # KL = E_p[a - b] - log sum exp a + log sum exp b
    return float((total - size + other).mean())


def _rounded(weight: Tensor, form: HeadFormat, rows: HeadRows) -> tuple[Codes, dict[str, Any]]:
    """Codes of the whole head, and what `mbq.json` says about error feedback."""
    if rows.read is None:
        parts = [
            quantize(weight[part].float(), scheme=form.scheme, group_size=form.group_size)
            for part in _parts(len(weight))
        ]
        return _joined(parts), {}
    hessian = rows.read.T @ rows.read
    factor = factorise(hessian, damp=rows.damp)
    return _fed_back(weight, form, hessian, factor)


def _fed_back(
    weight: Tensor, form: HeadFormat, hessian: Tensor, factor: Factor
) -> tuple[Codes, dict[str, Any]]:
    """Round part after part; errors of the whole are those of its parts, each by the size of its outputs."""
    codes, kinds, sizes = [], set(), []
    errors = {"nearest": 0.0, "kept": 0.0}
    for part in _parts(len(weight)):
        piece = weight[part].float()
        found = round_linear(piece, hessian, factor, scheme=form.scheme, group_size=form.group_size)
        sizes.append(weighted_square(piece.double(), hessian.double()))
        errors["nearest"] += found.nearest * sizes[-1]
        errors["kept"] += found.kept * sizes[-1]
        codes.append(found.codes)
        kinds.add((found.rounding, found.why))
    rounding, why = max(kinds, key=lambda kind: kind[0] == "gptq")
    size = sum(sizes) or 1.0
    return _joined(codes), {
        "rounding": rounding,
        "feedback": {
            "why": why,
            "hessian": "answers",
            "asym": 0.0,
            "damp": factor.damp,
            "held_out": None,
            "weighted_error": {kind: _short(error / size) for kind, error in errors.items()},
        },
    }


def _relative_error(weight: Tensor, codes: Codes) -> float:
    """As `apply.relative_error`, part by part."""
    change = size = 0.0
    for part in _parts(len(weight)):
        exact = weight[part].float().numpy().astype(np.float64)
        moved = dequantize(_slice(codes, part)).numpy().astype(np.float64)
        change += float(np.square(moved - exact).sum())
        size += float(np.square(exact).sum())
    return _short(float(np.sqrt(change / size))) if size else 0.0


def _parts(rows: int) -> Iterator[slice]:
    return (slice(start, start + ROWS_AT_ONCE) for start in range(0, rows, ROWS_AT_ONCE))


def _slice(codes: Codes, part: slice) -> Codes:
    return Codes(
        codes=codes.codes[part],
        scales=codes.scales[part],
        zeros=codes.zeros[part],
        clamped=codes.clamped,
    )


def _joined(parts: Sequence[Codes]) -> Codes:
    return Codes(
        codes=torch.cat([each.codes for each in parts]),
        scales=torch.cat([each.scales for each in parts]),
        zeros=torch.cat([each.zeros for each in parts]),
        clamped=sum(each.clamped for each in parts),
    )


def _short(value: float) -> float:
    return float(f"{value:.{ERROR_DIGITS}g}")
