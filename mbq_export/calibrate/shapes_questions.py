"""Questions with one right answer about the things in a picture.

| kind | example | answer |
|---|---|---|
| count | how many objects are there ? | 3 |
| count_attr | how many red objects are there ? | 1 |
| exist | is there a red star ? | yes |
| color | what color is the star ? | red |
| at | what is at the top left ? | red star |
| where | where is the red star ? | top left |
| read | what blue digit is shown ? | 7 |
| rel | what is left of the blue 7 ? | nothing |
| caption | describe the image . | top left red star , right blue 7 |

Words are separated by single blanks, punctuation too: one word is one token of tiny-llava-ov.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from mbq_export.calibrate.shapes_drawing import (
    COLORS,
    DIGITS,
    GRID,
    KINDS,
    POSITIONS,
    SHAPES,
    Dice,
    Thing,
)

CAPTION: Final = "caption"
NOTHING: Final = "nothing"
STEPS: Final = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
"""Relation words -> step in (row, column)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question about a picture.

    Attributes:
        text: The question, lower case, words and punctuation separated by blanks.
        answer: The only right answer, in the same form.
        kind: One of `QUESTION_KINDS`, or "caption".
    """

    text: str
    answer: str
    kind: str


def caption(things: Sequence[Thing]) -> Question:
    """Name every thing with its place, in reading order."""
    parts = [f"{POSITIONS[thing.cell]} {_name(thing)}" for thing in things]
    return Question(text="describe the image .", answer=" , ".join(parts), kind=CAPTION)


def ask(dice: Dice, things: Sequence[Thing], kind: str) -> Question | None:
    """Make one question of a kind, or None where the picture does not allow it.

    Args:
        dice: Where the choices come from.
        things: What the picture shows; at least one.
        kind: One of `QUESTION_KINDS`.
    """
    made = _ASKERS[kind](dice, things)
    return made and Question(text=made[0], answer=made[1], kind=kind)


_Pair = tuple[str, str]


def _name(thing: Thing) -> str:
    return f"{thing.color} {thing.kind}"


def _only(things: Sequence[Thing], key: Callable[[Thing], str]) -> list[Thing]:
    """Return the things that no other shares its key with: those a question can point at."""
    seen = Counter(map(key, things))
    return [thing for thing in things if seen[key(thing)] == 1]


def _count(_dice: Dice, things: Sequence[Thing]) -> _Pair:
    return "how many objects are there ?", str(len(things))


def _count_attr(dice: Dice, things: Sequence[Thing]) -> _Pair:
    if dice.chance(0.5):
        color = dice.pick(things).color if dice.chance(0.7) else dice.pick(tuple(COLORS))
        return (
            f"how many {color} objects are there ?",
            str(sum(thing.color == color for thing in things)),
        )
    if dice.chance(0.25):
        return "how many digits are there ?", str(sum(thing.is_digit for thing in things))
    shown = [thing.kind for thing in things if not thing.is_digit]
    shape = dice.pick(SHAPES) if dice.chance(0.4) or not shown else dice.pick(shown)
    return f"how many {shape} shapes are there ?", str(sum(t.kind == shape for t in things))


def _exist(dice: Dice, things: Sequence[Thing]) -> _Pair | None:
    if dice.chance(0.5):
        return f"is there a {_name(dice.pick(things))} ?", "yes"
    present = {(thing.color, thing.kind) for thing in things}
    for _ in range(20):
        # Mostly one thing's colour on another's shape: counting colours must not be enough.
        if dice.chance(0.7) and len(things) > 1:
            color, kind = dice.pick(things).color, dice.pick(things).kind
        else:
            color, kind = dice.pick(tuple(COLORS)), dice.pick(KINDS)
        if (color, kind) not in present:
            return f"is there a {color} {kind} ?", "no"
    return None


def _color(dice: Dice, things: Sequence[Thing]) -> _Pair | None:
    candidates = _only(things, lambda thing: thing.kind)
    if not candidates:
        return None
    thing = dice.pick(candidates)
    return f"what color is the {thing.kind} ?", thing.color


def _at(dice: Dice, things: Sequence[Thing]) -> _Pair:
    cell = dice.pick(things).cell if dice.chance(0.75) else dice.pick(range(GRID * GRID))
    return f"what is at the {POSITIONS[cell]} ?", _shown_at(things, cell) or NOTHING


def _where(dice: Dice, things: Sequence[Thing]) -> _Pair | None:
    candidates = _only(things, _name)
    if not candidates:
        return None
    thing = dice.pick(candidates)
    return f"where is the {_name(thing)} ?", POSITIONS[thing.cell]


def _read(dice: Dice, things: Sequence[Thing]) -> _Pair | None:
    digits = [thing for thing in things if thing.is_digit]
    if len(digits) == 1:
        return "what digit is shown ?", digits[0].kind
    candidates = _only(digits, lambda thing: thing.color)
    if not candidates:
        return None
    thing = dice.pick(candidates)
    return f"what {thing.color} digit is shown ?", thing.kind


def _rel(dice: Dice, things: Sequence[Thing]) -> _Pair | None:
    candidates = _only(things, _name)
    if not candidates:
        return None
    thing, step = dice.pick(candidates), dice.pick(tuple(STEPS))
    if dice.chance(0.7):  # Random steps mostly end in empty cells: prefer a real neighbour.
        pairs = [(t, s) for t in candidates for s in STEPS if _neighbour(things, t, s)]
        if pairs:
            thing, step = dice.pick(pairs)
    answer = _neighbour(things, thing, step) or NOTHING
    return f"what is {step} the {_name(thing)} ?", answer


def _shown_at(things: Sequence[Thing], cell: int) -> str | None:
    return next((_name(thing) for thing in things if thing.cell == cell), None)


def _neighbour(things: Sequence[Thing], thing: Thing, step: str) -> str | None:
    down, across = STEPS[step]
    row, column = thing.cell // GRID + down, thing.cell % GRID + across
    if not (0 <= row < GRID and 0 <= column < GRID):
        return None
    return _shown_at(things, row * GRID + column)


_ASKERS: Final[dict[str, Callable[[Dice, Sequence[Thing]], _Pair | None]]] = {
    "count": _count,
    "count_attr": _count_attr,
    "exist": _exist,
    "color": _color,
    "at": _at,
    "where": _where,
    "read": _read,
    "rel": _rel,
}
QUESTION_KINDS: Final = tuple(_ASKERS)

_FIXED_WORDS: Final = (
    "describe the image . , how many objects are there ? digits shapes is a what color at "
    "nothing where digit shown yes no left right of above below"
)
WORDS: Final = tuple(
    sorted({*COLORS, *SHAPES, *DIGITS, *" ".join(POSITIONS).split(), *_FIXED_WORDS.split()})
)
"""Every word that a question or an answer can hold, sorted."""
