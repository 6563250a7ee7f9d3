"""Folders whose files are their own registration: one member, one file, one constant.

A folder declares itself once, in its ``__init__.py``::

    METHODS = Folder(package=__name__, constant="METHOD", kind=Method)

and every module in it that is neither shared (``base``) nor private (``_name``) must define that constant.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from mbq_export.errors import InternalError, UsageError


class Named(Protocol):
    """What a member must have."""

    @property
    def name(self) -> str:
        """The name users type."""


Member = TypeVar("Member", bound=Named)


@dataclass(frozen=True, kw_only=True)
class Folder(Generic[Member]):
    """The members of one package, imported when first asked for.

    Attributes:
        package: Import path of the folder, usually ``__name__``.
        constant: Name that each member module must define, for example ``METHOD``.
        kind: Type of that constant.
        shared: Modules of the folder that are no members.
    """

    package: str
    constant: str
    kind: type[Member]
    shared: frozenset[str] = frozenset({"base"})
    _found: dict[str, Member] = field(default_factory=dict, repr=False, compare=False)

    def members(self) -> dict[str, Member]:
        """Import the folder once and return its members by name, sorted."""
        if not self._found:
            for member in self._imported():
                if member.name in self._found:
                    raise InternalError(
                        "E9002", f"Two members of {self.package} call themselves {member.name!r}."
                    )
                self._found[member.name] = member
        return dict(sorted(self._found.items()))

    def _imported(self) -> Iterator[Member]:
        folder = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(folder.__path__):
            if module.name in self.shared or module.name.startswith("_"):
                continue
            path = f"{self.package}.{module.name}"
            member = getattr(importlib.import_module(path), self.constant, None)
            if not isinstance(member, self.kind):
                raise InternalError(
                    "E9002",
                    f"{path} has no {self.constant} of type {self.kind.__name__}.",
                    why="the file is the registration",
                    fix=f"end the file with {self.constant}: Final = {self.kind.__name__}(...)",
                )
            yield member

    def names(self) -> tuple[str, ...]:
        """Names of all members, sorted."""
        return tuple(self.members())

    def __getitem__(self, name: str) -> Member:
        """Return a member.

        Raises:
            UsageError: E2001, naming the known members and the nearest, if there is none of that name.
        """
        members = self.members()
        if name in members:
            return members[name]
        near = difflib.get_close_matches(name, members, n=1)
        raise UsageError(
            "E2001",
            f"Unknown {self.constant.lower()} {name!r}.",
            why=f"known: {', '.join(members)}",
            fix=f"use {near[0]}" if near else f"use one of {', '.join(members)}",
        )
