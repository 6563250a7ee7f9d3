"""What a cache of 8 bits would cost answers, before any runtime has one.

    k, v of one token and head     s = max |row| / 127    rint(row / s) * s       symmetric, found while it runs
    KL at answers                  the oracle  ||  the oracle with the rows of one token class rounded

One class at a time, then all: vision tokens are most of a cache, and need not be as robust as words. Every read comes
from the rounded cache, within the prompt, too. Nothing here is a graph or a kernel: decoders keep 16 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from mbq_export.evaluate.comparison import TIER
from mbq_export.evaluate.metrics import divergences
from mbq_export.evaluate.sides import answer_rows, prompt_of
from mbq_export.families.base import ANSWER, PROMPT, TOKEN_CLASSES, VISION
from mbq_export.report import Check
from mbq_export.schemes.affine import rounded_per_token

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mbq_export.families.base import LoadedModel
    from mbq_export.families.inputs import ModelInputs

BITS: Final = 8
CLASSES: Final = (VISION, PROMPT, ANSWER)
NO_TOKENS: Final = "the samples have no such tokens"


def cache_checks(model: LoadedModel, samples: Sequence[ModelInputs]) -> list[Check]:
    """Measure every class and all together.

    Args:
        model: The oracle's.
        samples: With answers.

    Returns:
        Checks ``cache.kl``, one per class and one for all: mean KL at answers in nats, and the worst position. No limit
        is set: they fail only if a value is not finite.
    """
    exact = [_answers(sample, _logits(model, sample, ())) for sample in samples]
    return [_check(model, samples, exact, kinds) for kinds in (*((k,) for k in CLASSES), CLASSES)]


def _check(
    model: LoadedModel,
    samples: Sequence[ModelInputs],
    exact: Sequence[NDArray[np.float32]],
    kinds: tuple[int, ...],
) -> Check:
    name = TOKEN_CLASSES[kinds[0]] if len(kinds) == 1 else ""
    if not any(np.isin(sample.token_classes, kinds).any() for sample in samples):
        return Check(name="cache.kl", tier=TIER, ok=None, modality=name, why=NO_TOKENS)
    nats = np.concatenate(
        [
            divergences(wanted, _answers(sample, _logits(model, sample, kinds)))
            for sample, wanted in zip(samples, exact, strict=True)
        ]
    )
    return Check(
        name="cache.kl",
        tier=TIER,
        ok=bool(np.isfinite(nats).all()),
        value=float(nats.mean()),
        modality=name,
        worst=float(nats.max()),
    )


def _answers(sample: ModelInputs, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows that predict an answer's token."""
    return np.asarray(answer_rows(logits, prompt_of(sample)))


@torch.no_grad()
def _logits(model: LoadedModel, sample: ModelInputs, kinds: tuple[int, ...]) -> NDArray[np.float32]:
    """(T, V) logits with rows of some classes rounded in the cache."""
    chosen = torch.from_numpy(np.isin(sample.token_classes, kinds))
    cache = _rounding_cache(model, chosen)
    found = model.module(**sample.tensors(), past_key_values=cache, use_cache=True)
    logits: NDArray[np.float32] = found.logits[0].float().numpy()
    return logits


def _rounding_cache(model: LoadedModel, chosen: Tensor) -> Any:
    """A cache of transformers that keeps the rows of chosen tokens, (T,) bool, in 8 bits."""
    decoder: Any = model.module.get_submodule(model.family.blocks.rpartition(".")[0])
    return _RoundingCache(chosen, config=decoder.config)


class _RoundingCache(DynamicCache):
    """Rounds what it is given, one row of a token and head at a time, and forgets the rest."""

    def __init__(self, chosen: Tensor, **settings: Any) -> None:
        super().__init__(**settings)
        self._chosen = chosen

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep and return rounded rows; parameters have the names that transformers gives them."""
        keys, values = (rounded_rows(each, self._chosen) for each in (key_states, value_states))
        return super().update(keys, values, layer_idx, *args, **kwargs)


def rounded_rows(x: Tensor, chosen: Tensor) -> Tensor:
    """Round the rows of chosen tokens to 8 bits.

    Args:
        x: (B, H, T, D) keys or values.
        chosen: (T,) bool.

    Returns:
        The same shape; rows of other tokens as they are.
    """
    return torch.where(chosen[:, None], rounded_per_token(x, bits=BITS).to(x.dtype), x)
