"""Gradients of the answer's loss at the output of every linear, per token class and sample.

    a1[s, class] = mean of |g| over the tokens of a class and channels, g = dL[s]/dy       a2 likewise of g**2

The loss of a sample is the mean cross-entropy of its answer tokens. Gradients are taken block by block
from the last to the first, each block run once more, so one block's weights are in memory at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from mbq_export.blocks.room import drop
from mbq_export.blocks.tokens import class_mask
from mbq_export.errors import FormatError, GateError
from mbq_export.families.base import ANSWER, TOKEN_CLASSES
from mbq_export.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from mbq_export.blocks.stream import Batch, BlockStream

# A mean |g| of 1.7e-8 lies below the smallest fp16 number: gradients of a half-precision model need this.
FP16_LOSS_SCALE: Final = 4096.0


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Per-sample gradient statistics, NaN where a sample has no token of a class.

    Attributes:
        linears: Linears of a block, relative to it: axis J.
        mean_abs: (layers, J, classes, samples) float64, mean of |g|.
        mean_square: Same shape, mean of g**2.
        losses: (samples,) float64.
    """

    linears: tuple[str, ...]
    mean_abs: NDArray[np.float64]
    mean_square: NDArray[np.float64]
    losses: NDArray[np.float64]


def measure(
    stream: BlockStream,
    batches: Sequence[Batch],
    *,
    linears: tuple[str, ...],
    progress: Progress = silent,
) -> Gradients:
    """Run the model forwards and backwards, one block at a time.

    Memory: the input of every block for every sample, or on disk where the stream's room is.

    Args:
        stream: The model.
        batches: All samples.
        linears: Linears of a block, relative to it.
        progress: Called after each block, twice the number of blocks in all.

    Raises:
        FormatError: E4309 if a sample has no answer token to predict.
        GateError: E1103 if a loss or gradient is not finite.
    """
    for batch in batches:
        _require_answers(batch)
    depth = len(stream)
    rows: Sequence[Tensor] = [batch.hidden for batch in batches]
    inputs: list[Sequence[Tensor]] = []
    for index in range(depth):
        with stream.block(index) as block:
            # The embeddings stay with their batches; what blocks make of them is as large once per block.
            inputs.append(rows if index == 0 else stream.room.rows(rows))
            rows = stream.run_all(block, index, list(zip(batches, rows, strict=True)))
        progress(index + 1, 2 * depth, f"forward {index + 1}/{depth}")
    samples = sum(len(batch.samples) for batch in batches)
    shape = (depth, len(linears), len(TOKEN_CLASSES), samples)
    found = Gradients(
        linears=linears,
        mean_abs=np.full(shape, np.nan),
        mean_square=np.full(shape, np.nan),
        losses=np.zeros(samples),
    )
    gradients = [
        _head_gradient(stream, batch, hidden, found)
        for batch, hidden in zip(batches, rows, strict=True)
    ]
    del rows
    for index in reversed(range(depth)):
        with stream.block(index) as block:
            kept = inputs.pop()
            for position, (batch, hidden) in enumerate(zip(batches, kept, strict=True)):
                listening = _listen(block, index, batch, found)
                start = hidden.detach().requires_grad_()
                with torch.enable_grad():
                    end = stream.run(block, index, batch, start)
                (gradients[position],) = torch.autograd.grad(end, start, gradients[position])
                for handle in listening:
                    handle.remove()
                _require_finite(gradients[position], batch, f"gradient below block {index}")
            drop(kept)
        progress(2 * depth - index, 2 * depth, f"backward {depth - index}/{depth}")
    return found


def _require_answers(batch: Batch) -> None:
    predicted = (batch.classes[:, 1:] == ANSWER).sum(-1)
    if bool((predicted == 0).any()):
        sample = batch.samples[int((predicted == 0).nonzero()[0])]
        raise FormatError(
            "E4309",
            f"Sample {sample} has no answer tokens.",
            why="gradients start at the answer",
            fix="give every line of the data an answer",
        )


def _head_gradient(stream: BlockStream, batch: Batch, hidden: Tensor, found: Gradients) -> Tensor:
    """Gradient of the summed losses of a batch at the last block's output: (B, T, hidden)."""
    start = hidden.detach().requires_grad_()
    predicts = batch.classes[:, 1:] == ANSWER
    scale = FP16_LOSS_SCALE if hidden.dtype == torch.float16 else 1.0
    with torch.enable_grad():
        logits = stream.logits(start[:, :-1][predicts]).float()
        each = nn.functional.cross_entropy(logits, batch.ids[:, 1:][predicts], reduction="none")
        owner = predicts.nonzero()[:, 0]
        sums = torch.zeros(len(batch.samples)).index_add(0, owner, each)
        losses = sums / predicts.sum(-1)
    found.losses[list(batch.samples)] = losses.detach().double().numpy()
    _require_finite(losses.detach()[:, None], batch, "loss")
    (gradient,) = torch.autograd.grad(losses.sum() * scale, start)
    return gradient


def _listen(
    block: nn.Module, index: int, batch: Batch, found: Gradients
) -> list[torch.utils.hooks.RemovableHandle]:
    """Record the gradient at each linear's output when it is computed."""
    mask = class_mask(batch.classes)
    scale = FP16_LOSS_SCALE if batch.hidden.dtype == torch.float16 else 1.0
    samples = list(batch.samples)

    def recorder(place: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def record(gradient: Tensor) -> None:
            wide = gradient.float() / scale
            counts = mask.sum(-1) * wide.shape[-1]
            for store, values in (
                (found.mean_abs, wide.abs()),
                (found.mean_square, wide.square()),
            ):
                sums = torch.einsum("cbt,bt->cb", mask, values.sum(-1).double())
                # 0 / 0 is NaN: the sample has no token of the class.
                store[index, place][:, samples] = (sums / counts).numpy()

        def attach(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            output.register_hook(record)  # type: ignore[no-untyped-call]

        return attach

    return [
        block.get_submodule(name).register_forward_hook(recorder(place))
        for place, name in enumerate(found.linears)
    ]


def _require_finite(values: Tensor, batch: Batch, what: str) -> None:
    bad = ~torch.isfinite(values).flatten(1).all(-1)
    if bool(bad.any()):
        raise GateError(
            "E1103",
            f"Sample {batch.samples[int(bad.nonzero()[0])]}: {what} is not finite.",
            why=f"computed in {str(batch.hidden.dtype).removeprefix('torch.')}",
            fix="check the weights: mbq-export inspect MODEL",
        )
