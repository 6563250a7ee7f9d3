"""How far two results lie apart: one number per position, column or answer. Pure numpy, in float64.

    position   cosine, norm ratio, relative error      hidden states: direction, scale, both
    column     difference / size of the sum            one linear: finds a single wrong scale
    token      KL, top-k overlap, agreement            logits

Cosine is blind to a lost scale factor and the norm ratio to a turned vector, so both are always taken.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Rows = NDArray[np.float64]

Z_95: Final = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""


def cosines(reference: Array, tested: Array) -> Rows:
    """Cosine of the angle between two vectors, position by position.

    Args:
        reference: (M, C).
        tested: (M, C).

    Returns:
        (M,); 1 where both vectors are zero, 0 where one is.
    """
    a, b = reference.astype(np.float64), tested.astype(np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    both_zero = ~a.any(axis=-1) & ~b.any(axis=-1)
    dots = np.einsum("mc,mc->m", a, b)
    # A product of lengths below the smallest float64 would divide by zero; no activation is that small.
    return np.where(both_zero, 1.0, dots / np.maximum(lengths, np.finfo(np.float64).tiny))


def norm_ratios(reference: Array, tested: Array) -> Rows:
    """Length of the tested vector over that of the reference, position by position.

    Args:
        reference: (M, C).
        tested: (M, C).

    Returns:
        (M,); 1 where both are zero, infinite where only the reference is.
    """
    a = np.linalg.norm(reference.astype(np.float64), axis=-1)
    b = np.linalg.norm(tested.astype(np.float64), axis=-1)
    return _quotient(b, a, nothing=1.0)


def relative_errors(reference: Array, tested: Array) -> Rows:
    """Length of the difference over the length of the reference, position by position.

    Args:
        reference: (M, C).
        tested: (M, C).

    Returns:
        (M,); 0 where both are zero, infinite where only the reference is.
    """
    a, b = reference.astype(np.float64), tested.astype(np.float64)
    return _quotient(np.linalg.norm(b - a, axis=-1), np.linalg.norm(a, axis=-1), nothing=0.0)


def column_errors(
    inputs: Array, weights: Array, tested: Array, *, bias: Array | None = None
) -> tuple[Rows, NDArray[np.int64]]:
    """Error of each output column of a linear, in units of the sum that makes it.

        D[m,n] = |tested[m,n] - y[m,n]| / max(sqrt(sum_k (x[m,k] w[n,k])^2), |y[m,n]|, |bias[n]|)

    Rounding in a working precision u leaves D near u * sqrt(K), because the products of a sum round
    independently (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). A scale that is 10 % off in
    one of G groups leaves about 0.1 / sqrt(G) in its own column. The worst position of every column is
    taken, so that neither many good columns nor many quiet positions can hide it.

    Args:
        inputs: (M, K), what the tested linear was given.
        weights: (N, K), the weights it should have.
        tested: (M, N), what it gave back.
        bias: (N,), or None.

    Returns:
        (N,) the error of the worst position, and (N,) that position.
    """
    x, w = inputs.astype(np.float64), weights.astype(np.float64)
    offset = np.zeros(len(w)) if bias is None else bias.astype(np.float64)
    exact = x @ w.T + offset
    size = np.maximum(np.sqrt(np.square(x) @ np.square(w).T), np.maximum(abs(exact), abs(offset)))
    errors = _quotient(abs(tested.astype(np.float64) - exact), size, nothing=0.0)
    errors = np.where(np.isfinite(tested), errors, np.inf)
    worst = errors.argmax(axis=0)
    return errors[worst, np.arange(len(w))], worst


def log_probabilities(logits: Array) -> Rows:
    """Log-softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    normalized: Rows = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalized


def divergences(reference: Array, tested: Array) -> Rows:
    """KL(reference || tested) of next-token distributions, in nats.

    Args:
        reference: (M, V) logits.
        tested: (M, V) logits.

    Returns:
        (M,), not negative.
    """
    p, q = log_probabilities(reference), log_probabilities(tested)
    # Rounding may leave -1e-17 where the distributions are equal.
    nats: Rows = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)
    return nats


def top_overlap(reference: Array, tested: Array, *, k: int = 5) -> Rows:
    """Share of the reference's k likeliest tokens that are among the tested k likeliest.

    Args:
        reference: (M, V) logits, V >= k.
        tested: (M, V) logits.
        k: How many tokens.

    Returns:
        (M,), multiples of 1 / k.
    """
    first = np.argsort(-reference, axis=-1, kind="stable")[:, :k]
    second = np.argsort(-tested, axis=-1, kind="stable")[:, :k]
    shares: Rows = (first[:, :, None] == second[:, None, :]).any(axis=-1).mean(axis=-1)
    return shares


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Whether two sides would say the same next tokens.

    Attributes:
        same: Positions with the same likeliest token.
        ties: Positions that differ where the reference itself hardly prefers its own token.
        different: Positions that differ otherwise.
    """

    same: int
    ties: int
    different: int

    @property
    def rate(self) -> float:
        """Share of agreeing positions among those that are no ties; 1 if all are."""
        counted = self.same + self.different
        return self.same / counted if counted else 1.0


def agreement(reference: Array, tested: Array, *, noise: Array | float = 0.0) -> Agreement:
    """Compare likeliest tokens, setting apart those the reference cannot tell apart itself.

    Args:
        reference: (M, V) logits, V >= 2.
        tested: (M, V) logits.
        noise: (M,) or one number: a mismatch is a tie if the reference's two largest logits differ by no more.
    """
    same = reference.argmax(axis=-1) == tested.argmax(axis=-1)
    tie = ~same & (margins(reference) <= noise)
    return Agreement(same=int(same.sum()), ties=int(tie.sum()), different=int((~same & ~tie).sum()))


def margins(logits: Array) -> Rows:
    """Difference between the two largest logits of each position."""
    largest = np.partition(logits.astype(np.float64), -2, axis=-1)[..., -2:]
    margin: Rows = largest[..., 1] - largest[..., 0]
    return margin


def worst_low(values: Rows, share: float = 0.01) -> float:
    """Return the value that at least the given share of positions does not exceed: the worst cosines."""
    return float(np.quantile(values, share, method="lower"))


def worst_high(values: Rows, share: float = 0.01) -> float:
    """Return the value that at least the given share of positions reaches: the worst errors."""
    return float(np.quantile(values, 1 - share, method="higher"))


def wilson(hits: int, total: int, *, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson, JASA 22, 1927); (0, 1) of nothing.

    Args:
        hits: Successes.
        total: Trials.
        z: Normal quantile; the default gives 95 %.
    """
    if total == 0:
        return 0.0, 1.0
    share = hits / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * np.sqrt(share * (1 - share) / total + z * z / (4 * total**2))
    return max(0.0, float(center - half)), min(1.0, float(center + half))


def _quotient(numerator: Rows, denominator: Rows, *, nothing: float) -> Rows:
    """Divide; 0/0 gives ``nothing`` and x/0 infinity."""
    with np.errstate(divide="ignore", invalid="ignore"):
        divided = numerator / denominator
    return np.where((numerator == 0) & (denominator == 0), nothing, divided)
