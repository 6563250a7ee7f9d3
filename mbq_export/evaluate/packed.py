"""Many questions about one picture in one row of the decoder: an exact and quick evaluation.

    row:  vision tokens | question 1, answer 1 | question 2, answer 2 | ... | padding
    sees: the picture     the picture, itself    the picture, itself

Every question restarts its positions right after the vision tokens, and the mask is
block-diagonal, so each sees what it would see alone: logits equal those of one-question calls.
The picture is encoded once. With labels shifted by one, a question is right when the most
likely token is the wanted one at every place of the answer, `<eos>` included: that is when
greedy generation says exactly the answer.

For models of the layout of tiny-llava-ov: one picture, one tile as large as the picture.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbq_export.calibrate.shapes import Scene
from mbq_export.calibrate.shapes_questions import CAPTION, Question
from mbq_export.evaluate.tasks import bootstrap_ci

IGNORED: Final = -100
"""Label of positions without a wanted token."""

PADDING: Final = -1
PICTURE: Final = 0
MASKED: Final = -1e4
"""Added to masked attention scores; float16 and bfloat16 hold it."""

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Packed questions of B pictures, padded to T tokens. All (B, T) int64.

    Attributes:
        tokens: Token ids.
        positions: Position ids; each question starts where the vision tokens end.
        labels: The token wanted next, or `IGNORED`.
        segments: 1, 2, ... per question, `PADDING` behind the last.
    """

    tokens: Tensor
    positions: Tensor
    labels: Tensor
    segments: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a model made of one question.

    Attributes:
        scene: Number of the scene.
        question: What was asked.
        correct: Whether greedy generation would give exactly the answer.
        nll: Mean negative log likelihood of the answer's tokens, in nats.
    """

    scene: int
    question: Question
    correct: bool
    nll: float


def encoder(tokenizer: Any) -> Encode:
    """Return text -> token ids through a Hugging Face tokenizer, each text tokenized once."""
    known: dict[str, list[int]] = {}

    def encode(text: str) -> list[int]:
        if text not in known:
            known[text] = list(tokenizer(text, add_special_tokens=False).input_ids)
        return known[text]

    return encode


def pack(scenes: Sequence[Sequence[Question]], encode: Encode, *, vision_tokens: int) -> Rows:
    """Lay the questions of each picture behind each other.

    Args:
        scenes: Questions of each of B pictures.
        encode: Text -> token ids.
        vision_tokens: Vision tokens in front of every row.
    """
    rows = [_row(questions, encode, vision_tokens) for questions in scenes]
    longest = max(len(row[0]) for row in rows)
    filled = []
    for column, filler in enumerate((0, 0, IGNORED, PADDING)):
        values = torch.full((len(rows), longest), filler, dtype=torch.long)
        for index, row in enumerate(rows):
            values[index, : len(row[column])] = torch.tensor(row[column])
        filled.append(values)
    tokens, positions, labels, segments = filled
    return Rows(tokens=tokens, positions=positions, labels=labels, segments=segments)


def _row(questions: Sequence[Question], encode: Encode, start: int) -> tuple[list[int], ...]:
    tokens: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    segments: list[int] = []
    for segment, question in enumerate(questions, 1):
        prompt = encode(f"<q> {question.text} <a>")
        answer = encode(f"{question.answer} <eos>")
        length = len(prompt) + len(answer)
        tokens += prompt + answer
        positions += range(start, start + length)
        labels += [IGNORED] * (len(prompt) - 1) + answer + [IGNORED]
        segments += [segment] * length
    return tokens, positions, labels, segments


def attention_mask(segments: Tensor, *, vision_tokens: int) -> Tensor:
    """Return the additive mask of packed rows: causal, own question and picture only.

    Args:
        segments: (B, T) as in `Rows`.
        vision_tokens: V, the vision tokens in front of every row.

    Returns:
        (B, 1, V + T, V + T) float32, 0 where allowed.
    """
    picture = segments.new_full((segments.shape[0], vision_tokens), PICTURE)
    owner = torch.cat([picture, segments], 1)
    seen = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == PICTURE)
    seen &= torch.ones(owner.shape[1], owner.shape[1], dtype=torch.bool).tril()
    return torch.zeros(seen.shape).masked_fill_(~seen, MASKED)[:, None]


def pixels_from_images(images: NDArray[np.uint8]) -> Tensor:
    """Scale (B, 48, 48, 3) uint8 to (B, 3, 48, 48) float32 in [-1, 1], as the processor does."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def vision_states(model: Any, pixels: Tensor) -> Tensor:
    """Run the vision tower: (B, 3, 48, 48) to its last hidden states (B, 36, width)."""
    states: Tensor = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    return states


def image_embeddings(model: Any, states: Tensor) -> Tensor:
    """Project vision states and lay them out as the decoder gets them.

    With pinpoints [[48, 48]] the base view and the only tile are the same picture, so the tower
    runs once: 36 base tokens, then six rows of six patches, each closed by ``image_newline``.

    Returns:
        (B, 78, hidden).
    """
    base = model.model.multi_modal_projector(states)
    batch, patches, hidden = base.shape
    side = int(patches**0.5)
    newline = model.model.image_newline.to(base.dtype).expand(batch, side, 1, hidden)
    grid = torch.cat([base.view(batch, side, side, hidden), newline], 2).flatten(1, 2)
    return torch.cat([base, grid], 1)


def answer_logits(
    model: Any, scenes: Sequence[Sequence[Question]], states: Tensor, encode: Encode
) -> tuple[Tensor, Rows]:
    """Run packed questions through the decoder.

    Args:
        model: A LlavaOnevisionForConditionalGeneration.
        scenes: Questions of each of B pictures.
        states: (B, 36, width) from `vision_states`.
        encode: Text -> token ids.

    Returns:
        Logits (B, T, vocabulary) at the places of the text tokens, and the rows.
    """
    hidden, rows = _hidden(model, scenes, states, encode)
    return model.lm_head(hidden[:, -rows.tokens.shape[1] :]), rows


def all_logits(
    model: Any, scenes: Sequence[Sequence[Question]], states: Tensor, encode: Encode
) -> tuple[Tensor, Tensor, Rows]:
    """Run packed questions through the decoder and look at the picture's places too.

    Args:
        model: As in `answer_logits`.
        scenes: As there.
        states: As there.
        encode: As there.

    Returns:
        Logits (B, V, vocabulary) at the vision tokens, which see each other only; those of `answer_logits`; the rows.
    """
    hidden, rows = _hidden(model, scenes, states, encode)
    logits = model.lm_head(hidden)
    start = hidden.shape[1] - rows.tokens.shape[1]
    return logits[:, :start], logits[:, start:], rows


def _hidden(
    model: Any, scenes: Sequence[Sequence[Question]], states: Tensor, encode: Encode
) -> tuple[Tensor, Rows]:
    """What the decoder leaves at every place, (B, V + T, hidden), and the rows."""
    picture = image_embeddings(model, states)
    batch, vision_tokens = picture.shape[:2]
    rows = pack(scenes, encode, vision_tokens=vision_tokens)
    decoder = model.model.language_model
    text = decoder.embed_tokens(rows.tokens).to(picture.dtype)
    positions = torch.arange(vision_tokens).expand(batch, vision_tokens)
    hidden: Tensor = decoder(
        inputs_embeds=torch.cat([picture, text], 1),
        attention_mask=attention_mask(rows.segments, vision_tokens=vision_tokens),
        position_ids=torch.cat([positions, rows.positions], 1),
        use_cache=False,
    ).last_hidden_state
    return hidden, rows


@torch.no_grad()
def answer_scenes(
    model: Any, scenes: Iterable[Scene], encode: Encode, *, batch: int = 50
) -> list[Outcome]:
    """Ask everything about every scene.

    Args:
        model: A float32 LlavaOnevisionForConditionalGeneration in evaluation mode.
        scenes: Pictures with questions.
        encode: Text -> token ids.
        batch: Pictures at a time.
    """
    outcomes: list[Outcome] = []
    waiting: list[Scene] = []
    for scene in scenes:
        waiting.append(scene)
        if len(waiting) == batch:
            outcomes += _answer(model, waiting, encode)
            waiting = []
    return outcomes + (_answer(model, waiting, encode) if waiting else [])


def _answer(model: Any, scenes: Sequence[Scene], encode: Encode) -> list[Outcome]:
    pixels = pixels_from_images(np.stack([scene.image for scene in scenes]))
    asked = [scene.questions for scene in scenes]
    logits, rows = answer_logits(model, asked, vision_states(model, pixels), encode)
    return outcomes_of(scenes, logits, rows)


def outcomes_of(scenes: Sequence[Scene], logits: Tensor, rows: Rows) -> list[Outcome]:
    """Read off what logits from `answer_logits` make of every question."""
    wanted = rows.labels != IGNORED
    right = (logits.argmax(-1) == rows.labels) | ~wanted
    losses = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), rows.labels, ignore_index=IGNORED, reduction="none"
    )
    outcomes = []
    for index, scene in enumerate(scenes):
        for segment, question in enumerate(scene.questions, 1):
            own = rows.segments[index] == segment
            outcomes.append(
                Outcome(
                    scene=scene.number,
                    question=question,
                    correct=bool(right[index][own].all()),
                    nll=float(losses[index][own & wanted[index]].mean()),
                )
            )
    return outcomes


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Exact match of a set of answers; captions are counted apart.

    Attributes:
        exact_match: Share of questions answered exactly, captions left out.
        low: Lower end of the 95 % interval, bootstrapped over scenes.
        high: Upper end.
        questions: How many.
        by_kind: Kind -> (share, count), captions included.
    """

    exact_match: float
    low: float
    high: float
    questions: int
    by_kind: Mapping[str, tuple[float, int]]


def accuracy(outcomes: Sequence[Outcome], *, draws: int = 2000) -> Accuracy:
    """Summarise answers; the interval resamples scenes, since questions of one scene correlate.

    Args:
        outcomes: At least one answer that is not a caption.
        draws: Bootstrap draws, from a fixed stream.
    """
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for outcome in outcomes:
        by_kind[outcome.question.kind].append(outcome.correct)
    asked = [outcome for outcome in outcomes if outcome.question.kind != CAPTION]
    share = bootstrap_ci([o.correct for o in asked], [o.scene for o in asked], draws=draws)
    return Accuracy(
        exact_match=share.value,
        low=share.low,
        high=share.high,
        questions=share.n,
        by_kind={k: (float(np.mean(marks)), len(marks)) for k, marks in sorted(by_kind.items())},
    )
