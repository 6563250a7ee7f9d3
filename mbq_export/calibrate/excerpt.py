"""Tokens that stand for all: drawn per class, gathered from a module's calls, run through it with other weights.

A module that treats tokens one by one is run on the drawn rows alone. Attention needs the keys and values of every
token before a drawn one, but its queries, scores and outputs only where a token was drawn:

    keys, values of all T tokens of a sequence        one short call, which ends when they are known
    queries of M drawn tokens  ──► attention ──► (M, N)

Tokens of a class are drawn in an order, their *ranks*; the tokens of smaller rank are a smaller draw of their own.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from mbq_export.families.base import PAD

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mbq_export.blocks.stream import Batch

NEVER: Final = 1 << 40
"""Rank of an entry that is no token."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Tokens of one batch that are looked at.

    Attributes:
        sequences: (S,) int64, positions in the batch.
        places: (S, M) int64, positions in the sequence by rising rank, then zeros.
        ranks: (S, M) int64, order in which a token was drawn within its class; `NEVER` where there is none.
        classes: (S, M) int8; padding where there is none.
    """

    sequences: Tensor
    places: Tensor
    ranks: Tensor
    classes: Tensor


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """A module's call in full precision at drawn tokens.

    Attributes:
        rows: What the module reads: (n, K) the drawn rows, or (S, T, K) whole sequences for attention.
        places: (S, M) the queries that were drawn; None where rows are treated one by one.
        arguments: Other arguments, by name, as they are for the queries.
        everywhere: The same as they are for all tokens.
        output: (..., N) at the drawn tokens.
        classes: Their classes, shaped like the leading axes.
        ranks: Their ranks.
    """

    rows: Tensor
    places: Tensor | None
    arguments: Mapping[str, Any]
    everywhere: Mapping[str, Any]
    output: Tensor
    classes: Tensor
    ranks: Tensor

    def upto(self, size: int) -> Excerpt:
        """The smaller draw of the first `size` tokens of each class."""
        inside = self.ranks < size
        if self.places is None:
            return replace(
                self,
                rows=self.rows[inside],
                output=self.output[inside],
                classes=self.classes[inside],
                ranks=self.ranks[inside],
            )
        width = int(inside.sum(-1).max())
        cut = _queries(self.everywhere, self.places[:, :width], self.rows.shape[1])
        return replace(
            self,
            places=self.places[:, :width],
            arguments=cut,
            output=self.output[:, :width],
            classes=torch.where(inside, self.classes, PAD)[:, :width],
            ranks=self.ranks[:, :width],
        )


def draw(
    batches: Sequence[Batch],
    *,
    per_class: int,
    kinds: Sequence[int],
    seed: Sequence[int],
    most_tokens: int | None = None,
) -> list[Drawn | None]:
    """Draw at most `per_class` tokens of each class, without replacement.

    Args:
        batches: All samples.
        per_class: Most tokens of a class.
        kinds: Classes to draw from.
        seed: Of the generator: the same seed draws the same tokens.
        most_tokens: Draw from some sequences only, which have together about so many tokens; None for all.

    Returns:
        Per batch; None where nothing was drawn.
    """
    rng = np.random.default_rng(list(seed))
    classes = [batch.classes.numpy() for batch in batches]
    ranks = [np.full(each.shape, NEVER, np.int64) for each in classes]
    allowed = _sequences(classes, most_tokens, rng)
    flat = np.concatenate([each.ravel() for each in classes])
    usable = np.concatenate(
        [np.repeat(a, c.shape[1]) for a, c in zip(allowed, classes, strict=True)]
    )
    order = np.full(len(flat), NEVER, np.int64)
    for kind in sorted(kinds):
        places = rng.permutation(np.flatnonzero((flat == kind) & usable))[:per_class]
        order[places] = np.arange(len(places))
    ends = np.cumsum([each.size for each in classes])
    for each, end in zip(ranks, ends, strict=True):
        each[...] = order[end - each.size : end].reshape(each.shape)
    return [_of_batch(*pair) for pair in zip(ranks, classes, strict=True)]


def gather(rows: Tensor, output: Tensor, arguments: Mapping[str, Any], drawn: Drawn) -> Excerpt:
    """Take the drawn tokens out of a call.

    Args:
        rows: (B, T, K) first argument.
        output: (B, T, N).
        arguments: The others; none where the module treats rows one by one.
        drawn: Tokens of the batch.
    """
    at = drawn.sequences[:, None], drawn.places
    found = Excerpt(
        rows=rows[drawn.sequences] if arguments else rows[at],
        places=drawn.places if arguments else None,
        arguments={},
        everywhere={
            name: _of_sequences(v, drawn.sequences, len(rows)) for name, v in arguments.items()
        },
        output=output[at],
        classes=drawn.classes,
        ranks=drawn.ranks,
    )
    # Entries without a token go where rows stand alone; queries stay a rectangle.
    return found.upto(NEVER)


def joined(excerpts: Sequence[Excerpt]) -> list[Excerpt]:
    """Put excerpts of many batches together: rows as they are, sequences filled up at their ends.

    What fills a sequence up lies behind all its tokens, where none of them looks. Sequences whose model says itself
    which tokens may be seen stay apart.
    """
    if len(excerpts) < 2 or any(x.everywhere.get("attention_mask") is not None for x in excerpts):
        return list(excerpts)
    rows, output, classes, ranks = (
        _stacked([getattr(each, name) for each in excerpts], filled=filled)
        for name, filled in (("rows", 0.0), ("output", 0.0), ("classes", PAD), ("ranks", NEVER))
    )
    one = replace(excerpts[0], rows=rows, output=output, classes=classes, ranks=ranks)
    if one.places is None:
        return [one]
    tables = [
        [table.expand(len(each.rows), -1, -1) for table in each.everywhere["position_embeddings"]]
        for each in excerpts
    ]
    rotary = tuple(_stacked(list(table), filled=0.0) for table in zip(*tables, strict=True))
    places = _stacked([each.places for each in excerpts if each.places is not None], filled=0)
    everywhere = {"position_embeddings": rotary, "attention_mask": None}
    return [replace(one, places=places, everywhere=everywhere).upto(NEVER)]


def _stacked(parts: Sequence[Tensor], *, filled: float) -> Tensor:
    """Concatenate along the first axis; the second is filled up to the longest where it may differ."""
    width = max(part.shape[1] for part in parts) if parts[0].dim() > 1 else 0
    if all(part.dim() == 1 or part.shape[1] == width for part in parts):
        return torch.cat(list(parts))
    found = parts[0].new_full((sum(map(len, parts)), width, *parts[0].shape[2:]), filled)
    start = 0
    for part in parts:
        found[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return found


def run(module: nn.Module, weights: Mapping[str, Tensor], excerpt: Excerpt) -> Tensor:
    """Output of a module with other weights at the tokens of an excerpt: (..., N). The module is not changed.

    Args:
        module: Treats rows one by one, or is an attention as transformers writes them.
        weights: Parameters to put in place, by name.
        excerpt: What it reads.
    """
    if excerpt.places is None:
        return _output(torch.func.functional_call(module, dict(weights), (excerpt.rows,)))
    cache = _AllTokens()
    every = {**excerpt.everywhere, "past_key_values": cache}
    with suppress(_KnownError):
        torch.func.functional_call(module, _one_query_head(module, weights), (excerpt.rows,), every)
    at = torch.arange(len(excerpt.places))[:, None], excerpt.places
    some = {**excerpt.arguments, "past_key_values": cache}
    return _output(torch.func.functional_call(module, dict(weights), (excerpt.rows[at],), some))


class _KnownError(Exception):
    """Ends a call of an attention once keys and values of all tokens are known."""


class _AllTokens:
    """Stands where an attention expects a cache: hears keys and values of all tokens, then answers with them."""

    def __init__(self) -> None:
        self.heard: tuple[Tensor, Tensor] | None = None

    def update(
        self, keys: Tensor, values: Tensor, *_place: object, **_more: object
    ) -> tuple[Tensor, Tensor]:
        if self.heard is None:
            self._hear(keys, values)
        assert self.heard is not None  # the call before ended here
        return self.heard

    def _hear(self, keys: Tensor, values: Tensor) -> NoReturn:
        self.heard = keys, values
        raise _KnownError


def _one_query_head(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for a call that only wants keys and values: what queries would cost is spared by asking for one head."""
    size = int(module.head_dim)  # type: ignore[arg-type]
    found = dict(weights)
    for name in ("q_proj.weight", "q_proj.bias"):
        parameter = weights.get(name, dict(module.named_parameters()).get(name))
        if parameter is not None:
            found[name] = parameter[:size]
    return found


def _output(result: Any) -> Tensor:
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found


def _sequences(classes: list[Any], most_tokens: int | None, rng: np.random.Generator) -> list[Any]:
    """Which sequences of each batch may be drawn from: at least one."""
    lengths = np.concatenate([np.full(len(each), each.shape[1]) for each in classes])
    allowed = np.ones(len(lengths), bool)
    if most_tokens is not None and lengths.sum() > most_tokens:
        order = rng.permutation(len(lengths))
        before = np.cumsum(lengths[order]) - lengths[order]
        allowed[order] = before < most_tokens
    return np.split(allowed, np.cumsum([len(each) for each in classes])[:-1])


def _of_batch(ranks: Any, classes: Any) -> Drawn | None:
    sequences = np.flatnonzero((ranks < NEVER).any(-1))
    if not len(sequences):
        return None
    order = np.argsort(ranks[sequences], axis=-1, kind="stable")
    width = int((ranks[sequences] < NEVER).sum(-1).max())
    order = order[:, :width]
    found = np.take_along_axis(ranks[sequences], order, -1)
    real = found < NEVER
    kinds = np.take_along_axis(classes[sequences], order, -1)
    return Drawn(
        sequences=torch.from_numpy(sequences),
        places=torch.from_numpy(np.where(real, order, 0)),
        ranks=torch.from_numpy(found),
        classes=torch.from_numpy(np.where(real, kinds, PAD).astype(np.int8)),
    )


def _of_sequences(value: Any, sequences: Tensor, count: int) -> Any:
    """An argument for some sequences of a batch; one that all share stays as it is."""
    if isinstance(value, Tensor):
        return value[sequences] if value.dim() and len(value) == count > 1 else value
    if isinstance(value, tuple):
        return tuple(_of_sequences(inner, sequences, count) for inner in value)
    return value


def _queries(everywhere: Mapping[str, Any], places: Tensor, tokens: int) -> dict[str, Any]:
    """Arguments of attention for some of its queries: their rotary tables, and which tokens each may see."""
    rotary = tuple(
        table.expand(len(places), -1, -1)[torch.arange(len(places))[:, None], places]
        for table in everywhere["position_embeddings"]
    )
    mask = everywhere.get("attention_mask")
    if mask is None:
        seen = places[:, None, :, None] >= torch.arange(tokens)
    else:
        every = mask.expand(len(places), *mask.shape[1:])
        seen = every.gather(2, places[:, None, :, None].expand(-1, every.shape[1], -1, tokens))
    return {"position_embeddings": rotary, "attention_mask": seen}
