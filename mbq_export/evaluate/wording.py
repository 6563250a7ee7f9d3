"""Amounts and foreign text as people read them."""

import math
import re
from typing import Any, Final

from mbq_export.evaluate.lookup import number

HASH_DIGITS: Final = 12
KILO: Final = 1000.0
UNITS: Final = ("B", "kB", "MB", "GB", "TB")

NEAR_ONE: Final = 0.01
MORE_DIGITS: Final = 6
"""Digits of a number that lies this near 1, like a cosine: fewer would print a limit of 0.99999 as 1."""

_STEERING: Final = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]+"
)


def visible(text: str) -> str:
    """Text on one line, without what would steer a terminal, turn the direction, or be no character at all."""
    return _STEERING.sub(" ", text)


def plain(value: float, digits: int = 3) -> str:
    """A number as short as it can be read: 12.3, 45,600, 1.2e-6, nan."""
    if not math.isfinite(value):
        return str(value)
    if value != 1 and abs(value - 1) < NEAR_ONE:
        digits = max(digits, MORE_DIGITS)
    shown = f"{value:.{digits}g}"
    mantissa, _, exponent = shown.partition("e")
    if not exponent:
        return shown
    return f"{mantissa}e{int(exponent)}" if abs(value) < 1 else f"{float(shown):,.0f}"


def figure(value: Any, digits: int = 4) -> str:
    """A finite number with few digits; nothing for anything else."""
    amount = number(value)
    return "" if amount is None else plain(amount, digits)


def size(value: Any) -> str:
    """Bytes in the unit that keeps them short; nothing for what is no number."""
    amount = number(value)
    if amount is None:
        return ""
    power = 0
    while abs(amount) >= KILO and power < len(UNITS) - 1:
        amount, power = amount / KILO, power + 1
    return f"{plain(amount)} {UNITS[power]}"


def percent(value: Any) -> str:
    """A share as a percentage; nothing for what is no number."""
    amount = number(value)
    return "" if amount is None else f"{100 * amount:.1f} %"


def percents(low: Any, high: Any) -> str:
    """Two shares as a range of percentages; nothing if one is no number."""
    ends = number(low), number(high)
    if ends[0] is None or ends[1] is None:
        return ""
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f} %"


def short_hash(value: Any) -> str:
    """The beginning of a hash, enough to compare by eye."""
    text = str(value or "").removeprefix("sha256:")
    return f"{text[:HASH_DIGITS]}…" if len(text) > HASH_DIGITS else text
