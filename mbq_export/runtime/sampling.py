"""The next token out of the logits, and whether the tokens so far still say anything.

temperature 0    argmax; of equal logits the lowest id, as numpy and torch do
temperature t    softmax(logits / t), cut to the smallest set whose probability reaches top-p, drawn
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mbq_export.errors import GateError, UsageError

LONGEST_NGRAM: Final = 8
NGRAM_REPEATS: Final = 6
TOKEN_REPEATS: Final = 24
"""Times in a row after which n-grams of 2 .. 8 tokens, or one token alone, count as collapse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to generate.

    Attributes:
        max_new_tokens: Most tokens to generate, the end token included.
        temperature: 0 for greedy.
        top_p: Probability mass to draw from, in (0, 1].
        seed: Of the draws.
        stop: Texts that end generation; the text before the first of them is kept.
        ignore_end: Go on after an end token, to time a fixed number of tokens.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_end: bool = False

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            UsageError: E2017.
        """
        if self.max_new_tokens < 1:
            raise _out_of_range("--max-new-tokens", self.max_new_tokens, "at least 1")
        if not 0 <= self.temperature <= 100:
            raise _out_of_range("--temperature", self.temperature, "0 (greedy) to 100")
        if not 0 < self.top_p <= 1:
            raise _out_of_range("--top-p", self.top_p, "above 0, at most 1")
        if "" in self.stop:
            raise _out_of_range("--stop", "''", "at least one character")


class Sampler:
    """Chooses tokens; one per generation, since it holds the stream of draws."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._draws = np.random.default_rng(options.seed)

    def choose(self, logits: NDArray[Any]) -> int:
        """Choose a token.

        Args:
            logits: (V,), any float type.

        Raises:
            GateError: E1103 if a logit is NaN or infinite.
        """
        check_finite(logits)
        if not self._options.temperature:
            return int(logits.argmax())
        probabilities = nucleus(logits, self._options.temperature, self._options.top_p)
        return int(self._draws.choice(probabilities.size, p=probabilities))


def nucleus(logits: NDArray[Any], temperature: float, top_p: float) -> NDArray[np.float64]:
    """Return the distribution to draw from: nucleus sampling (Holtzman et al. 2020, section 3.1).

    Args:
        logits: (V,), finite.
        temperature: Above 0.
        top_p: In (0, 1].

    Returns:
        (V,) float64, sum 1: the smallest set of most likely tokens whose probability reaches ``top_p``.
    """
    scaled = logits.astype(np.float64) / temperature
    probabilities: NDArray[np.float64] = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    probabilities[order[before >= top_p]] = 0.0
    probabilities /= probabilities.sum()
    return probabilities


def check_finite(logits: NDArray[Any]) -> None:
    """Refuse logits that no token can be chosen from.

    Raises:
        GateError: E1103.
    """
    bad = int(logits.size - np.isfinite(logits).sum())
    if bad:
        raise GateError(
            "E1103",
            f"{bad} of {logits.size} logits are NaN or infinite.",
            why="an activation overflowed, or the graph or a weight is damaged; no text is made of this",
            fix=("mbq-export validate BUNDLE", "mbq-export run BUNDLE --backend oracle"),
        )


def collapse(tokens: Sequence[int]) -> str:
    """Say how the newest tokens repeat themselves; an empty string if they do not."""
    if len(tokens) >= TOKEN_REPEATS and len(set(tokens[-TOKEN_REPEATS:])) == 1:
        return f"one token {TOKEN_REPEATS} times in a row"
    for width in range(2, LONGEST_NGRAM + 1):
        window = list(tokens[-width * NGRAM_REPEATS :])
        repeats = window == window[:width] * NGRAM_REPEATS
        if repeats and len(set(window)) > 1:
            return f"the same {width} tokens {NGRAM_REPEATS} times in a row"
    return ""


def _out_of_range(option: str, value: object, allowed: str) -> UsageError:
    return UsageError(
        "E2017",
        f"{option} {value} is out of range.",
        why=f"{option} is {allowed}",
        fix=f"use another {option}",
    )
