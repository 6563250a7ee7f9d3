"""Looking into parsed JSON whose shape nobody promises: what is not there, or is something else, is nothing."""

from collections.abc import Mapping
from typing import Any, Final

NOT_FINITE: Final = ("nan", "inf", "-inf")
"""How results spell what JSON has no number for."""

LARGEST: Final = 1e100
"""What is beyond is no measurement, and its square overflows."""


def dig(value: Any, *keys: str | int) -> Any:
    """Follow keys and indices into parsed JSON; None where one leads nowhere."""
    for key in keys:
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list) and isinstance(key, int) and key < len(value):
            value = value[key]
        else:
            return None
    return value


def items(value: Any) -> list[Mapping[str, Any]]:
    """The objects of a list, or nothing."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def texts(value: Any) -> list[str]:
    """The members of a list as text, or nothing."""
    return [words(item) for item in value] if isinstance(value, list) else []


def entries(value: Any) -> Mapping[str, Any]:
    """An object's entries, or nothing."""
    return value if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    """A finite number of sensible size, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < LARGEST else None


def finding(value: Any) -> float | None:
    """A number, or what results spell as text because JSON has no NaN; None for anything else."""
    return float(value) if value in NOT_FINITE else number(value)


def words(value: Any) -> str:
    """A value as a person writes it; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {words(inner)}" for key, inner in value.items())
    return ", ".join(map(words, value)) if isinstance(value, list) else str(value)
