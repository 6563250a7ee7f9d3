r"""One line of calibration data to one sample, in either of two forms.

ours    {"id": "1", "images": ["a.jpg"], "prompt": "What is shown?", "answer": "A cat."}
LLaVA   {"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat ..."},
                                                       {"from": "gpt", "value": "A cat."}]}
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mbq_export.errors import FormatError
from mbq_export.reading import LINES_SHOWN, read_jsonl, regular_size

if TYPE_CHECKING:
    from PIL.Image import Image

PLACEHOLDER: Final = "<image>"
EXAMPLE: Final = '{"id": "1", "images": ["a.jpg"], "prompt": "What is shown?", "answer": "A cat."}'
SPEAKERS: Final = ("human", "gpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Pictures, a prompt about them and the answer a model should learn nothing from but its statistics.

    Attributes:
        id: From the line, or its number.
        images: Paths as the line states them, relative to the manifest; or pictures.
        prompt: The last prompt.
        answer: What follows it.
        earlier: Prompts and answers before.
        line: Number of the line, 0 if generated.
    """

    id: str
    images: "tuple[str | Path | Image, ...]"
    prompt: str
    answer: str
    earlier: tuple[tuple[str, str], ...] = ()
    line: int = 0


def read_samples(path: Path) -> list[Sample]:
    """Read all lines of a manifest; pictures are not opened.

    Raises:
        FormatError: E4301 for a file that is missing, empty or none, E4302 for lines that are no JSON, E4303
            for lines with wrong fields. The first five bad lines are named.
    """
    if regular_size(path, code="E4301") == 0:
        raise _empty(path)
    samples: list[Sample] = []
    bad: list[str] = []
    for number, line in read_jsonl(path, code="E4302"):
        try:
            samples.append(_sample(line, number))
        except _BadFieldError as error:
            bad.append(f"line {number}: {error}")
    if bad:
        raise FormatError(
            "E4303",
            f"{len(bad)} lines of {path.name} have wrong fields: {'; '.join(bad[:LINES_SHOWN])}.",
            why=f"a line looks like {EXAMPLE}, or like LLaVA's conversations",
            fix=f"mend the lines named here (the first {LINES_SHOWN} are shown)",
        )
    if not samples:
        raise _empty(path)
    return samples


class _BadFieldError(ValueError):
    """What is wrong with one line, to be collected."""


def _empty(path: Path) -> FormatError:
    return FormatError(
        "E4301",
        f"{path.name} holds no sample.",
        why="calibration data is one JSON object per line",
        fix=(f"write lines like {EXAMPLE}", "--data builtin:shapes (a smoke test only)"),
    )


def _sample(line: Mapping[str, Any], number: int) -> Sample:
    name = line.get("id", number)
    if not isinstance(name, (str, int)):
        raise _BadFieldError("id is neither text nor a number")
    if "conversations" in line:
        turns, images = _conversation(line)
    else:
        turns, images = [(_text(line, "prompt"), _text(line, "answer"))], line.get("images", [])
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise _BadFieldError("images is no list of paths")
    prompt, answer = turns[-1]
    return Sample(
        id=str(name),
        images=tuple(images),
        prompt=prompt,
        answer=answer,
        earlier=tuple(turns[:-1]),
        line=number,
    )


def _conversation(line: Mapping[str, Any]) -> tuple[list[tuple[str, str]], Any]:
    """Read LLaVA's form: speakers alternate, all pictures stand in the first prompt."""
    turns = line["conversations"]
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise _BadFieldError("conversations is no list of prompts and answers in turn")
    texts = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") != SPEAKERS[index % 2]:
            speaker = turn.get("from") if isinstance(turn, dict) else turn
            raise _BadFieldError(
                f"turn {index + 1} is from {str(speaker)[:40]!a}, expected {SPEAKERS[index % 2]}"
            )
        texts.append(_text(turn, "value"))
    images = line.get("image", [])
    count = 1 if isinstance(images, str) else len(images) if isinstance(images, list) else 0
    if texts[0].count(PLACEHOLDER) != count or any(PLACEHOLDER in text for text in texts[2::2]):
        raise _BadFieldError(
            f"{count} images need {count} {PLACEHOLDER} in the first prompt, and none later"
        )
    texts[0] = texts[0].replace(PLACEHOLDER, "").strip()
    if not texts[0]:
        raise _BadFieldError("the first prompt is empty")
    return _pairs(texts), images


def _pairs(texts: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(texts[::2], texts[1::2], strict=True))


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not value.strip():
        raise _BadFieldError(f"{name} is {'missing' if value is None else 'empty or no text'}")
    return value
