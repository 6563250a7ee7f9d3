"""What a method is: a preset of switches, and a rule that finds the channel scale of one unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from mbq_export.channel_scales import OF_FEEDBACK, OF_SCOPE, Switches
from mbq_export.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from mbq_export.calibrate.units import UnitView

PUBLISHED: Final[Mapping[str, object]] = {
    "grid": "20",
    "stat": "mixed",
    "tokens": "all",
    "gqa_o_scale": False,
    "r_floor": "median",
    "search_prompt_weight": "0",
    "prefix": "fp",
    "rounding": "nearest",
    "search_scope": "linear",
}
"""What ``--compat mbq`` fixes beside the quantizer's arithmetic (METHODS 2.5)."""

OF_SEARCH: Final = ("stat", "loss", "grid", "gqa_o_scale", "prefix", "tokens")
"""Switches that decide nothing unless candidates are tried."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The scale that a search chose for one unit.

    Attributes:
        alpha: Exponent on the grid.
        scales: (K,) float32 e.
        record: What `calib.json` keeps: losses over the grid, tokens used, dead channels.
    """

    alpha: float
    scales: Tensor
    record: Mapping[str, object]


ScaleRule = Callable[["UnitView", Switches], Found | None]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One named preset.

    Attributes:
        name: The name users type.
        switches: The preset; options of the command line replace single fields.
        balanced: Whether the loss weighs token classes by the measured ratios r.
        scales: Looks at one unit and changes nothing; None leaves every unit as it is.
        computed: Whether `scales` follows from the statistics, without candidates.
    """

    name: str
    switches: Switches
    balanced: bool
    scales: ScaleRule | None
    computed: bool = False

    def needs_ratios(self, switches: Switches) -> bool:
        """Whether gradients must be measured for these switches, by the search or by error feedback."""
        search = self.scales is not None and (
            self.balanced or switches.stat == "balanced" or switches.grid == "auto"
        )
        return search or (switches.rounding == "gptq" and switches.hessian != "plain")

    def resolve(self, chosen: Mapping[str, Any]) -> Switches:
        """Put the user's choices over the preset.

        Args:
            chosen: Fields of `Switches` that the user named, nothing else.

        Raises:
            UsageError: E2001 for an unknown value, E2002 if a choice contradicts ``compat`` or decides nothing.
        """
        if chosen.get("compat") != "mbq":
            found = replaced(self.switches, chosen)
            self._refuse_idle(chosen, found)
            return found
        published = all(
            getattr(self.switches, name) == PUBLISHED[name] for name in ("rounding", "search_scope")
        )
        if not published or self.switches.stat == "max":
            raise UsageError(
                "E2002",
                f"--compat mbq contradicts --method {self.name}.",
                why="the published code searches scales and rounds to the nearest code",
                fix=("--method mbq", "leave --compat out"),
            )
        for name, value in chosen.items():
            if PUBLISHED.get(name, value) != value:
                raise UsageError(
                    "E2002",
                    f"--compat mbq contradicts {name} = {value}.",
                    why=f"the published code uses {name} = {PUBLISHED[name]}",
                    fix=(f"leave {name} out", "leave --compat out"),
                )
        found = replaced(self.switches, {"clip": "none", **PUBLISHED, **chosen})
        self._refuse_idle(chosen, found)
        return found

    def _refuse_idle(self, chosen: Mapping[str, Any], found: Switches) -> None:
        """Refuse choices about a search that is not made, and weights that nothing is weighed by.

        Raises:
            UsageError: E2002.
        """
        searches = self.scales is not None and not self.computed
        idle = {} if searches else dict.fromkeys(OF_SEARCH, "searches no scale")
        if found.search_scope == "block":
            idle = {name: why for name, why in idle.items() if name not in {"loss", "tokens"}}
        if not (searches and self.balanced):
            idle["search_prompt_weight"] = "weighs no token class in a search"
        if not self.needs_ratios(found):
            idle |= dict.fromkeys(("r_floor", "modality_weight"), "weighs nothing by a ratio")
        elif found.modality_weight is not None:
            idle["r_floor"] = "with --modality-weight has one ratio for all layers"
        for name, why in idle.items():
            if name in chosen:
                raise UsageError(
                    "E2002",
                    f"--{name.replace('_', '-')} decides nothing here.",
                    why=f"--method {self.name} {why}",
                    fix=(f"leave out --{name.replace('_', '-')}", "--method mbq"),
                )


def replaced(switches: Switches, chosen: Mapping[str, Any]) -> Switches:
    """Put the user's choices over resolved switches.

    Raises:
        UsageError: E2001 for an unknown value, E2002 for a choice that decides nothing.
    """
    found = replace(switches, **chosen)
    if found.compat == "mbq" and found.clip != "none":
        raise UsageError(
            "E2002",
            f"--compat mbq contradicts --clip {found.clip}.",
            why="the published code rounds weights over their whole range",
            fix=("--clip none", "calibrate without --compat"),
        )
    if found.search_scope == "block":
        _refuse_against_scope(found)
    idle = [name for name in OF_FEEDBACK if name in chosen]
    if idle and found.rounding != "gptq":
        raise UsageError(
            "E2002",
            f"--{idle[0].replace('_', '-')} decides nothing here.",
            why=f"--rounding {found.rounding} rounds each weight by itself",
            fix=("--rounding gptq", "--method mbq+"),
        )
    idle = [name for name in OF_SCOPE if name in chosen and name != "search_scope"]
    if idle and found.search_scope == "linear":
        raise UsageError(
            "E2002",
            f"--{idle[0].replace('_', '-')} decides nothing here.",
            why="--search-scope linear looks at one unit at a time",
            fix=("--search-scope block", "--method qvlm"),
        )
    return found


def _refuse_against_scope(found: Switches) -> None:
    """Refuse what chooses the ranges of weights besides a joint search, or has no range to choose.

    Raises:
        UsageError: E2002.
    """
    against = (
        (found.compat == "mbq", "compat mbq", "the published code looks at one unit at a time"),
        (found.clip == "group", "clip group", "both choose the ranges of groups"),
        (
            found.rounding == "gptq",
            "rounding gptq",
            "error feedback moves weights after their range",
        ),
    )
    instead = ("compat none", "clip none", "rounding nearest")
    for (given, option, why), other in zip(against, instead, strict=True):
        if given:
            raise UsageError(
                "E2002",
                f"--search-scope block contradicts --{option}.",
                why=why,
                fix=("--search-scope linear", f"--{other}"),
            )
    if found.search_alpha and found.stat == "max":
        raise UsageError(
            "E2002",
            "--search-alpha decides nothing here.",
            why=f"the scales of --method {found.method} are no power of one statistic",
            fix=("leave --search-alpha out", "--method qvlm"),
        )
