"""Every answer is the right one: a slow second opinion reads each question and looks for itself."""

import re
from collections import Counter
from typing import Any

import pytest

from mbq_export.calibrate.shapes_drawing import POSITIONS, Dice, Thing, draw_things
from mbq_export.calibrate.shapes_questions import (
    QUESTION_KINDS,
    WORDS,
    Question,
    ask,
    caption,
)

TWO = (Thing(cell=0, color="red", kind="star"), Thing(cell=1, color="blue", kind="7"))


def second_opinion(text: str, things: tuple[Thing, ...]) -> str:
    """Answer a question from its words alone."""
    at = {thing.cell: f"{thing.color} {thing.kind}" for thing in things}
    if text.startswith("how many "):
        return str(counted(text, things))
    if found := re.fullmatch(r"is there a (\w+ \w+) \?", text):
        return "yes" if found[1] in at.values() else "no"
    if found := re.fullmatch(r"what color is the (\w+) \?", text):
        return only([thing.color for thing in things if thing.kind == found[1]])
    if found := re.fullmatch(r"what is at the (.+) \?", text):
        return at.get(POSITIONS.index(found[1]), "nothing")
    if found := re.fullmatch(r"where is the (\w+ \w+) \?", text):
        return POSITIONS[only([cell for cell, name in at.items() if name == found[1]])]
    if found := re.fullmatch(r"what (\w+ |)digit is shown \?", text):
        wanted = found[1].strip() or ".*"
        return only([t.kind for t in things if t.kind.isdigit() and re.match(wanted, t.color)])
    found = re.fullmatch(r"what is (left of|right of|above|below) the (\w+ \w+) \?", text)
    assert found, text
    row, column = divmod(only([cell for cell, name in at.items() if name == found[2]]), 3)
    row += {"above": -1, "below": 1}.get(found[1], 0)
    column += {"left of": -1, "right of": 1}.get(found[1], 0)
    inside = 0 <= row <= 2 and 0 <= column <= 2
    return at.get(3 * row + column, "nothing") if inside else "nothing"


def counted(text: str, things: tuple[Thing, ...]) -> int:
    """Answer a question that starts with "how many"."""
    if text == "how many objects are there ?":
        return len(things)
    if text == "how many digits are there ?":
        return sum(thing.kind in "0123456789" for thing in things)
    found = re.fullmatch(r"how many (\w+) (objects|shapes) are there \?", text)
    assert found, text
    if found[2] == "objects":
        return [thing.color for thing in things].count(found[1])
    return [thing.kind for thing in things].count(found[1])


def only(found: list[Any]) -> Any:
    """Return the only element: the question must point at exactly one thing."""
    (one,) = found
    return one


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_answers_agree_with_a_second_opinion(kind: str) -> None:
    asked = 0
    for number in range(400):
        dice = Dice(number)
        things = draw_things(dice)
        question = ask(dice, things, kind)
        if question is not None:
            asked += 1
            assert question.kind == kind
            assert question.answer == second_opinion(question.text, things), question
    assert asked > 200


def test_a_caption_names_everything_in_reading_order() -> None:
    assert caption(TWO) == Question(
        text="describe the image .", answer="top left red star , top blue 7", kind="caption"
    )


def test_words_hold_every_word_of_every_question_and_no_other() -> None:
    used: set[str] = set()
    for number in range(1500):
        dice = Dice(number)
        things = draw_things(dice)
        for question in (caption(things), *(ask(dice, things, kind) for kind in QUESTION_KINDS)):
            if question is not None:
                used |= {*question.text.split(), *question.answer.split()}
    assert used == set(WORDS)
    assert len(WORDS) == 54


def test_exist_is_true_half_of_the_time() -> None:
    answers = Counter()
    for number in range(2000):
        dice = Dice(number)
        question = ask(dice, draw_things(dice), "exist")
        answers[question.answer if question else None] += 1
    assert answers[None] == 0
    assert abs(answers["yes"] / 2000 - 0.5) < 0.04


def test_twins_are_never_asked_for_as_if_there_were_one() -> None:
    twins = tuple(Thing(cell=cell, color="red", kind="star") for cell in (0, 4))
    for number in range(20):
        assert ask(Dice(number), twins, "where") is None
        assert ask(Dice(number), twins, "color") is None
        assert ask(Dice(number), twins, "rel") is None


def test_a_picture_without_digits_is_not_asked_to_be_read() -> None:
    assert ask(Dice(0), TWO[:1], "read") is None
    assert ask(Dice(0), TWO, "read") == Question(
        text="what digit is shown ?", answer="7", kind="read"
    )
