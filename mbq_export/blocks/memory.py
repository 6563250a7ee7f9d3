"""What a calibration is going to take of memory, told before it begins (METHODS 15.2).

    gradients   block + rows of every block + gradients of rows + what a batch leaves for its backward pass
    search      block + rows twice + drawn tokens + candidate weights + what a batch passes through
    now         libraries, the model outside its blocks, encoded samples

The larger of the first two counts, on top of the last. Rows of every block are what grows with the depth of a model,
and what goes to disk where memory is short.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mbq_export.blocks.stream import BATCH_TOKENS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from mbq_export.families.base import LoadedModel
    from mbq_export.families.inputs import ModelInputs

BACKWARD_WIDTHS: Final = (16, 7)
"""Rows of the hidden width and of the MLP's that a block keeps per token for its backward pass, with temporaries."""
FORWARD_WIDTHS: Final = (8, 4)
"""The same for a pass without gradients."""
FIRST_USE: Final = 48 << 20
"""What libraries take when they are first used, and what an allocator cannot give back."""
HEAD_COPIES: Final = 5
"""Logits, their softmax, gradients and temporaries."""
CANDIDATE_COPIES: Final = 2
DRAWN: Final = 2048
"""Tokens that the last step of a race sees, of the classes together."""
ATTENDED: Final = 16384
"""Tokens whose attention inputs are kept for the steps of a race."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes by what takes them.

    Attributes:
        now: What the process has already.
        rows: Rows of all blocks, while gradients are measured; what may go to disk.
        gradients: The rest of that phase; 0 where it is left out.
        search: The search's phase.
    """

    now: int
    rows: int
    gradients: int
    search: int

    def peak(self, *, on_disk: bool = False) -> int:
        """Most that the process takes at a time."""
        rows = 0 if on_disk else self.rows
        return self.now + max(self.gradients + rows, self.search)

    def as_json(self, *, on_disk: bool) -> dict[str, object]:
        """For documents."""
        return {
            "now": self.now,
            "rows": self.rows,
            "gradients": self.gradients,
            "search": self.search,
            "rows_on_disk": on_disk,
            "peak": self.peak(on_disk=on_disk),
        }

    def told(self, *, on_disk: bool, limit: int | None) -> str:
        """One line for people."""
        where = "on disk" if on_disk else "in memory"
        most = "" if limit is None else f" of {_mib(limit)}"
        return (
            f"about {_mib(self.peak(on_disk=on_disk))}{most}: {_mib(self.now)} now, "
            f"{_mib(self.gradients)} for gradients, {_mib(self.search)} for the search; "
            f"rows of all blocks, {_mib(self.rows)}, {where}"
        )


def plan_memory(
    model: LoadedModel, inputs: Sequence[ModelInputs], *, gradients: bool, searches: bool
) -> MemoryPlan:
    """Plan a calibration.

    Args:
        model: Sizes and dtype.
        inputs: Encoded samples.
        gradients: Whether gradients are measured.
        searches: Whether scales are searched.
    """
    text, block = model.text, model.module.get_submodule(f"{model.family.blocks}.0")
    parameters = dict(block.named_parameters())
    size = next(iter(parameters.values())).element_size()
    weights = sum(parameter.numel() for parameter in parameters.values())
    lengths = Counter(len(sample.input_ids) for sample in inputs)
    tokens = sum(length * count for length, count in lengths.items())
    batch = max(
        (length * min(count, max(1, BATCH_TOKENS // length)) for length, count in lengths.items()),
        default=0,
    )
    rows = tokens * text.hidden * size
    answers = max((int((sample.token_classes == 3).sum()) for sample in inputs), default=0)
    logits = HEAD_COPIES * 4 * text.vocab * answers * max(1, batch // max(lengths, default=1))
    return MemoryPlan(
        now=resident_bytes() + FIRST_USE,
        rows=max(0, text.layers - 1) * rows if gradients else 0,
        gradients=0
        if not gradients
        else 3 * rows + weights * size + max(logits, batch * _widths(model, BACKWARD_WIDTHS) * 4),
        search=0
        if not searches
        else 3 * rows
        + weights * size
        + CANDIDATE_COPIES * 4 * _largest_unit(model, parameters)
        + min(tokens, DRAWN) * _widths(model, (4, 1)) * size
        + min(tokens, ATTENDED) * text.hidden * size
        + batch * _widths(model, FORWARD_WIDTHS) * 4,
    )


def resident_bytes() -> int:
    """Memory that the process has now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def _widths(model: LoadedModel, copies: tuple[int, int]) -> int:
    return copies[0] * model.text.hidden + copies[1] * model.text.intermediate


def _largest_unit(model: LoadedModel, parameters: Mapping[str, Tensor]) -> int:
    """Weights of the largest set of linears that share a scale."""
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    return max(
        sum(sizes[f"{linear}.weight"] for linear in place.into) for place in model.family.smooth
    )


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"
