"""What `describe` says of a file or folder: facts and tables, for people and for machines."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One table of a description."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def as_json(self) -> list[dict[str, Any]]:
        """One object per row."""
        return [dict(zip(self.header, row, strict=True)) for row in self.rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What was found.

    Attributes:
        kind: Bundle, checkpoint, calibration, model, tensors or graph.
        facts: Single values, in reading order.
        tables: Longer lists.
    """

    kind: str
    facts: dict[str, Any]
    tables: list[Table] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Form of the JSON document."""
        return {
            "kind": self.kind,
            "facts": self.facts,
            **{table.title.replace(" ", "_"): table.as_json() for table in self.tables},
        }
