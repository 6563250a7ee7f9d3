r"""A conversation to text with known seams, by the model's own chat template.

The template is rendered once with placeholders instead of what people wrote, by the sandboxed renderer of
transformers. So user text is never seen by template code, and the seams between template, prompt and answer
are known exactly:

    <|im_start|>user <image>\n  What is shown?  <|im_end|><|im_start|>assistant\n  A cat.  <|im_end|>
    └────── template ──────────┘└─── prompt ───┘└────────── template ──────────────┘└answer┘└template┘
"""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import jinja2

from mbq_export.errors import FormatError

if TYPE_CHECKING:
    from types import FrameType

    from transformers import PreTrainedTokenizerBase

LONGEST: Final = 1 << 20
LONGEST_S: Final = 2.0
HOLE: Final = "\ue000[0-9]+\ue001"
"""Placeholders are numbers between characters for private use, which no template writes."""

Origin = Literal["template", "prompt", "answer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A run of text of one origin.

    Attributes:
        text: What it says.
        origin: Who wrote it.
    """

    text: str
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """A rendered template with holes.

    Attributes:
        parts: Text before, between and after the holes; one more than there are holes.
        ending: What ends an assistant turn, right after its text.
        lead: What stands between the generation prompt and an answer, mostly nothing.
    """

    parts: tuple[str, ...]
    ending: str
    lead: str

    def fill(self, turns: Sequence[tuple[str, str]], prompt: str) -> list[Piece]:
        """Put texts into the holes.

        Args:
            turns: Earlier prompts and answers.
            prompt: The last prompt, after which the template asks for an answer.
        """
        texts = [text for turn in turns for text in turn] + [prompt]
        pieces = [Piece(text=self.parts[0], origin="template")]
        for index, (text, after) in enumerate(zip(texts, self.parts[1:], strict=True)):
            pieces.append(Piece(text=text, origin="answer" if index % 2 else "prompt"))
            pieces.append(Piece(text=after, origin="template"))
        return pieces


def skeleton(
    tokenizer: "PreTrainedTokenizerBase", template: str | None, *, images: int, turns: int
) -> Skeleton:
    """Render a template for a conversation of a given form.

    Args:
        tokenizer: Its special tokens are known to the template.
        template: The model's template; the tokenizer's own if None.
        images: Pictures in the first prompt.
        turns: Earlier prompts and answers.

    Raises:
        FormatError: E4205 for a template that fails, runs too long, writes too much, or loses, repeats or
            changes the texts.
    """
    holes = [f"\ue000{number}\ue001" for number in range(2 * turns + 2)]
    messages = [
        _message("assistant" if index % 2 else "user", hole, images=images if index == 0 else 0)
        for index, hole in enumerate(holes)
    ]
    asked = _render(tokenizer, template, messages[:-1], ask=True)
    answered = _render(tokenizer, template, messages, ask=False)
    if re.findall(HOLE, asked) != holes[:-1] or re.findall(HOLE, answered) != holes:
        raise _refused("it leaves out, repeats or reorders messages")
    parts = re.split(HOLE, asked)
    before, _, ending = answered.partition(holes[-1])
    lead = before.removeprefix(asked) if before.startswith(asked) else ""
    return Skeleton(parts=tuple(parts), ending=ending, lead=lead)


def _message(role: str, text: str, *, images: int) -> dict[str, Any]:
    pictures = [{"type": "image"}] * images
    return {"role": role, "content": [*pictures, {"type": "text", "text": text}]}


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    template: str | None,
    messages: Sequence[dict[str, Any]],
    *,
    ask: bool,
) -> str:
    try:
        with _time_limit(LONGEST_S):
            text = tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=ask
            )
    except jinja2.TemplateError as error:
        raise _refused(f"{type(error).__name__}: {error}") from error
    except TimeoutError as error:
        raise _refused(f"it ran for more than {LONGEST_S:g} s") from error
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise _refused(f"{type(error).__name__}: {error}") from error
    except (MemoryError, RecursionError) as error:
        raise _refused(f"it needs too much memory ({type(error).__name__})") from error
    if not isinstance(text, str) or len(text) > LONGEST:
        raise _refused(f"it wrote more than {LONGEST} characters")
    return text


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Stop template code after some seconds of this thread's own time.

    Templates are compiled to lines of Python, so a trace function sees every turn of a loop, even of one
    that writes nothing; no thread or signal is needed. A single operation that takes long is not stopped.
    """
    deadline = time.thread_time() + seconds

    def watch(frame: "FrameType", _event: str, _value: object) -> Any:
        if time.thread_time() > deadline:
            raise TimeoutError
        return watch if frame.f_code.co_filename.startswith("<") else None

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


def _refused(reason: str) -> FormatError:
    return FormatError(
        "E4205",
        f"The chat template cannot be used: {reason[:300]}.",
        why=(
            f"it runs sandboxed, at most {LONGEST_S:g} s and {LONGEST} characters, and must write each "
            "message once"
        ),
        fix="download chat_template.jinja or tokenizer_config.json again",
    )
