"""Fields of a config, read strictly: a wrong one is named with its value and what is accepted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from mbq_export.errors import FormatError

LARGEST: Final = 1 << 24
_REQUIRED: Final = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """One object of a config.

    Attributes:
        values: The object.
        place: How messages call it, for example ``text_config``.
        family: Name of the family that reads it.
    """

    values: Mapping[str, Any]
    place: str
    family: str

    def section(self, name: str) -> "Fields":
        """Return an object inside this one.

        Raises:
            FormatError: E4003 if it is missing or no object.
        """
        value = self.values.get(name)
        if not isinstance(value, dict):
            self.refuse(name, value, "an object")
        return Fields(values=value, place=name, family=self.family)

    def integer(
        self, name: str, *, low: int = 1, high: int = LARGEST, default: object = _REQUIRED
    ) -> int:
        """Return a whole number in [low, high].

        Raises:
            FormatError: E4003 if it is missing without default, no whole number or out of range.
        """
        value = self._get(name, default)
        if type(value) is not int or not low <= value <= high:
            self.refuse(name, value, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, *, low: float, high: float, default: object = _REQUIRED) -> float:
        """Return a number in [low, high].

        Raises:
            FormatError: E4003 likewise.
        """
        value = self._get(name, default)
        if type(value) not in {int, float} or not low <= value <= high:
            self.refuse(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """Return true or false; null counts as missing.

        Raises:
            FormatError: E4003 for anything else.
        """
        value = self.values.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            self.refuse(name, value, "true or false")
        return value

    def choice(self, name: str, accepted: tuple[object, ...], *, default: object) -> Any:
        """Return a value out of a few.

        Raises:
            FormatError: E4005 for any other: the family exists in a form that is not supported.
        """
        value = self.values.get(name)
        value = default if value is None else value
        if value not in accepted:
            self.unsupported(name, value, f"supported: {', '.join(map(str, accepted))}")
        return value

    def unsupported(self, name: str, value: object, why: str) -> NoReturn:
        """Refuse a variant of the family.

        Raises:
            FormatError: E4005.
        """
        raise FormatError(
            "E4005",
            f"{self.place}.{name} = {_shown(value)} is not supported by family {self.family}.",
            why=why,
            fix="mbq-export models",
        )

    def _get(self, name: str, default: object) -> Any:
        value = self.values.get(name)
        if value is None and default is not _REQUIRED:
            return default
        if name not in self.values:
            self.refuse(name, "missing", "given")
        return value

    def refuse(self, name: str, value: object, expected: str) -> NoReturn:
        """Refuse a value.

        Raises:
            FormatError: E4003.
        """
        raise FormatError(
            "E4003",
            f"{self.place}.{name} is {_shown(value)}.",
            why=f"it must be {expected}",
            fix="download config.json again",
        )


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
