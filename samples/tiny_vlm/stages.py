"""The three stages of training: see, name, answer.

1. probe: the vision tower learns what is in each cell, through a throw-away linear head.
2. align: projected patches move to the embeddings of the words that describe their cell.
3. answer: questions, packed; losses on the answers only.

Every stage is a `Stage`: what one step computes, its optimizers, its schedule. `train.py` runs
them. Scenes are numbered, so step k of a stage always sees the same pictures.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (the name every torch user knows)
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mbq_export.calibrate.shapes import TRAINING_SCENES, Mix, Scene, make_scenes
from mbq_export.calibrate.shapes_drawing import COLORS, GRID, KINDS, POSITIONS
from mbq_export.calibrate.shapes_questions import NOTHING
from mbq_export.evaluate.packed import (
    IGNORED,
    answer_logits,
    encoder,
    pixels_from_images,
    vision_states,
)
from samples.tiny_vlm.model import TOKEN_IDS, build_tokenizer

CELLS: Final = GRID * GRID
NO_COLOR: Final = len(COLORS)
NO_KIND: Final = len(KINDS)
PROBE_STEPS, PROBE_BATCH = 2000, 64
ALIGN_STEPS, ALIGN_BATCH = 1000, 64
ANSWER_STEPS, ANSWER_BATCH = 4200, 16
PEAK_RATE: Final = 2.2e-3  # of Muon in stage 3

# More of what is learned last: count, count_attr, exist, color, at, where, read, rel.
KIND_WEIGHTS: Final = (0.5, 1.0, 1.0, 0.8, 1.2, 1.2, 1.0, 1.8)
# (progress below, relative frequency of 1..6 things): few things first.
CURRICULUM: Final = (
    (0.15, (4, 4, 3, 1, 0, 0)),
    (0.30, (2, 3, 3, 3, 1, 0)),
    (1.00, (1, 2, 3, 3, 2, 1)),
)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training.

    Attributes:
        name: Short name for logs and the record.
        steps: Optimizer steps.
        batch: Scenes a step.
        loss: Step number -> loss, a scalar with gradients.
        optimizers: Each parameter group holds its "peak" rate.
        rate: Progress in [0, 1) and step -> factor on the peak rates.
    """

    name: str
    steps: int
    batch: int
    loss: Callable[[int], Tensor]
    optimizers: tuple[torch.optim.Optimizer, ...]
    rate: Callable[[float, int], float]

    def step(self, number: int) -> float:
        """Make optimizer step `number` and return its loss."""
        factor = self.rate(number / self.steps, number)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group in groups:
            group["lr"] = group["peak"] * factor
        loss = self.loss(number)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return float(loss.detach())


class Probe(nn.Module):
    """Reads colour and kind of each of the nine cells from the cell's four patches."""

    def __init__(self, width: int) -> None:
        """Make the head for vision states `width` wide."""
        super().__init__()
        self.head = nn.Linear(4 * width, NO_COLOR + 1 + NO_KIND + 1)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return colour logits (B, 9, 7) and kind logits (B, 9, 17) of states (B, 36, width)."""
        batch, _, width = states.shape
        patches = states.view(batch, GRID, 2, GRID, 2, width).permute(0, 1, 3, 2, 4, 5)
        colors, kinds = self.head(patches.reshape(batch, CELLS, 4 * width)).split(
            (NO_COLOR + 1, NO_KIND + 1), -1
        )
        return colors, kinds

    def loss(self, states: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """Return cross-entropy of colour plus that of kind, over all cells."""
        colors, kinds = cell_labels(scenes)
        color_logits, kind_logits = self(states)
        return F.cross_entropy(color_logits.float().flatten(0, 1), colors.flatten()) + (
            F.cross_entropy(kind_logits.float().flatten(0, 1), kinds.flatten())
        )


def cell_labels(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Return colour and kind numbers (B, 9) of every cell; empty cells get the last number."""
    colors = torch.full((len(scenes), CELLS), NO_COLOR)
    kinds = torch.full((len(scenes), CELLS), NO_KIND)
    color_names = list(COLORS)
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            colors[index, thing.cell] = color_names.index(thing.color)
            kinds[index, thing.cell] = KINDS.index(thing.kind)
    return colors, kinds


def describing_words() -> tuple[str, ...]:
    """Return the words stage 2 aligns: colours, kinds, "nothing", and the words of places."""
    places = " ".join(POSITIONS).split()
    return tuple(dict.fromkeys((*COLORS, *KINDS, NOTHING, *places)))


def word_targets(scenes: Sequence[Scene]) -> Tensor:
    """Return (B, 36, words) float: 1 where a word of `describing_words` fits a patch's cell."""
    words = describing_words()
    cells = torch.zeros(len(scenes), CELLS, len(words))
    for cell, place in enumerate(POSITIONS):
        for word in place.split():
            cells[:, cell, words.index(word)] = 1
    for index, scene in enumerate(scenes):
        shown = {thing.cell: (thing.color, thing.kind) for thing in scene.things}
        for cell in range(CELLS):
            for word in shown.get(cell, (NOTHING,)):
                cells[index, cell, words.index(word)] = 1
    grid = cells.view(-1, GRID, 1, GRID, 1, len(words))
    return grid.expand(-1, GRID, 2, GRID, 2, len(words)).reshape(len(scenes), -1, len(words))


def scenes_of_step(stage: int, step: int, batch: int, **asking: Any) -> list[Scene]:
    """Return the `batch` training scenes of one step; stage n starts at scene n million."""
    first = stage * TRAINING_SCENES + step * batch
    return list(make_scenes(batch, seed=first, **asking))


def pixels_of(scenes: Sequence[Scene]) -> Tensor:
    """Return (B, 3, 48, 48) float32."""
    return pixels_from_images(np.stack([scene.image for scene in scenes]))


def probe_stage(model: Any, probe: Probe, *, steps: int = PROBE_STEPS) -> Stage:
    """Make stage 1: cross-entropy of colour and kind per cell."""
    parameters = [*model.model.vision_tower.parameters(), *probe.parameters()]

    def loss(step: int) -> Tensor:
        scenes = scenes_of_step(1, step, PROBE_BATCH, questions_per_image=0, captions=0.0)
        return probe.loss(vision_states(model, pixels_of(scenes)), scenes)

    return Stage(
        name="probe",
        steps=steps,
        batch=PROBE_BATCH,
        loss=loss,
        optimizers=(adamw([(parameters, 2e-3)], decay=0.01),),
        rate=schedule(warm_up=100, flat=0.0, floor=0.02),
    )


def align_stage(model: Any, probe: Probe, *, steps: int = ALIGN_STEPS) -> Stage:
    """Make stage 2: which words describe a patch, by cosine similarity with their embeddings.

    Without it the decoder has to find out by answers alone what a patch is about, and a
    smaller decoder stayed near 55 %.
    """
    bridge = model.model.multi_modal_projector
    embeddings = model.model.language_model.embed_tokens.weight
    ids = torch.tensor([TOKEN_IDS[word] for word in describing_words()])
    temperature, bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-3.0))
    parameters = [
        *model.model.vision_tower.parameters(),
        *bridge.parameters(),
        *probe.parameters(),
        embeddings,
        temperature,
        bias,
    ]

    def loss(step: int) -> Tensor:
        scenes = scenes_of_step(2, step, ALIGN_BATCH, questions_per_image=0, captions=0.0)
        states = vision_states(model, pixels_of(scenes))
        patches = F.normalize(bridge(states), dim=-1)
        words = F.normalize(embeddings[ids], dim=-1)
        logits = patches @ words.T * temperature.exp() + bias
        fit = F.binary_cross_entropy_with_logits(logits, word_targets(scenes))
        return fit + 0.1 * probe.loss(states, scenes)

    return Stage(
        name="align",
        steps=steps,
        batch=ALIGN_BATCH,
        loss=loss,
        optimizers=(adamw([(parameters, 1.5e-3)], decay=0.01),),
        rate=schedule(warm_up=20, flat=0.0, floor=0.05),
    )


def answer_stage(model: Any, probe: Probe, *, steps: int = ANSWER_STEPS) -> Stage:
    """Make stage 3: cross-entropy of the answers' tokens, in bfloat16 autocast."""
    use_packed_attention(model)
    encode = encoder(build_tokenizer())
    vision = [*model.model.vision_tower.parameters()]
    matrices = [p for p in model.model.language_model.layers.parameters() if p.ndim == 2]
    apart = {id(parameter) for parameter in vision + matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in apart]
    muon = torch.optim.Muon(
        [{"params": matrices, "lr": PEAK_RATE, "peak": PEAK_RATE}],
        weight_decay=0.02,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    slower = adamw([(rest, 0.6 * PEAK_RATE), ([*vision, *probe.parameters()], 5e-4)], decay=0.02)

    def loss(step: int) -> Tensor:
        objects = next(weights for end, weights in CURRICULUM if step / steps < end)
        mix = Mix(objects=objects, kinds=KIND_WEIGHTS, most_tokens=96)
        scenes = scenes_of_step(
            3, step, ANSWER_BATCH, questions_per_image=14, captions=0.35, mix=mix
        )
        questions = [scene.questions for scene in scenes]
        with torch.autocast("cpu", torch.bfloat16):
            states = vision_states(model, pixels_of(scenes))
            logits, rows = answer_logits(model, questions, states, encode)
        answers = F.cross_entropy(
            logits.float().flatten(0, 1), rows.labels.flatten(), ignore_index=IGNORED
        )
        return answers + 0.2 * probe.loss(states.float(), scenes)

    return Stage(
        name="answer",
        steps=steps,
        batch=ANSWER_BATCH,
        loss=loss,
        optimizers=(slower, muon),
        rate=schedule(warm_up=60, flat=0.45, floor=0.01),
    )


def adamw(groups: Sequence[tuple[list[nn.Parameter], float]], *, decay: float) -> torch.optim.AdamW:
    """Return AdamW over (parameters, peak rate) groups, betas 0.9 and 0.98."""
    return torch.optim.AdamW(
        [{"params": parameters, "lr": rate, "peak": rate} for parameters, rate in groups],
        weight_decay=decay,
        betas=(0.9, 0.98),
    )


def schedule(*, warm_up: int, flat: float, floor: float) -> Callable[[float, int], float]:
    """Return linear warm-up over steps, flat to progress `flat`, then cosine down to `floor`."""

    def rate(progress: float, step: int) -> float:
        fall = max(0.0, progress - flat) / (1 - flat)
        cosine = 0.5 * (1 + math.cos(math.pi * fall))
        return min(1.0, (step + 1) / warm_up) * (floor + (1 - floor) * cosine)

    return rate


def use_packed_attention(model: Any) -> None:
    """Let the decoder of this object use `packed_attention`; a saved folder does not name it."""
    ALL_ATTENTION_FUNCTIONS.register("packed", packed_attention)
    model.model.language_model.config._attn_implementation = "packed"  # noqa: SLF001


def packed_attention(
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float = 1.0,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Grouped-query attention with plain matrix products.

    On a CPU in bfloat16 its backward is far quicker than scaled_dot_product_attention's with a
    mask (README.md, "Time").

    Args:
        module: Unused; part of the interface.
        query: (B, H, T, D).
        key: (B, H / heads per key, T, D).
        value: Like `key`.
        attention_mask: (B, 1, T, T), added to the scores.
        scaling: Factor on the scores.

    Returns:
        (B, T, H, D), and None for the weights.
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    stacked = (query * scaling).reshape(batch, groups, heads // groups * length, width)
    scores = (stacked @ key.transpose(-1, -2)).view(batch, groups, heads // groups, length, -1)
    weights = (scores + attention_mask[:, :, None].to(scores.dtype)).softmax(-1).to(value.dtype)
    mixed = weights.view(batch, groups, heads // groups * length, -1) @ value
    return mixed.view(batch, heads, length, width).transpose(1, 2).contiguous(), None
