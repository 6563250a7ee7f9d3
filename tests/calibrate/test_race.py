"""The race of candidates: estimates that know their error, and the winner of the search that spares no effort."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from mbq_export.blocks.loss import ClassWeights, class_totals, coefficients, token_counts
from mbq_export.blocks.stream import BlockStream
from mbq_export.calibrate import Recipe, calibrate
from mbq_export.calibrate.excerpt import Excerpt
from mbq_export.calibrate.methods import METHODS
from mbq_export.calibrate.race import Step, estimate, race
from mbq_export.families.base import ANSWER, PROMPT, VISION, LoadedModel
from mbq_export.families.inputs import ModelInputs
from mbq_export.schemes import SCHEMES
from tests.questions import questions, sample_model, tiny_model
from tests.reference import naive

SAME_SHARE = 0.6
"""Of units whose exponent is found on drawn tokens, too; the others miss it by a near tie."""
MISSED = 0.005
"""How much larger the error at the exponent of few tokens may be than the least."""


def step_of(classes: Tensor, keep: int) -> Step:
    """A step over tokens of which the race only reads the classes."""
    nothing = torch.zeros(len(classes), 1)
    excerpt = Excerpt(
        rows=nothing,
        places=None,
        arguments={},
        everywhere={},
        output=nothing,
        classes=classes,
        ranks=torch.arange(len(classes)),
    )
    return Step(excerpts=[excerpt], keep=keep)


def test_an_estimate_is_unbiased_and_knows_its_error() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = torch.tensor([VISION] * 700 + [ANSWER] * 200 + [PROMPT] * 100, dtype=torch.int8)
    errors = torch.rand(2, 1000, generator=generator, dtype=torch.float64)
    errors[1] += 0.05 * torch.randn(1000, generator=generator, dtype=torch.float64) + 0.01
    tokens = token_counts(classes)
    weigh = coefficients(tokens, width=8, loss="mae", weights=ClassWeights(vision=0.4))
    truth = class_totals(errors, classes) @ weigh
    apart, inside = [], 0
    for _ in range(400):
        drawn = torch.cat(
            [
                torch.nonzero(classes == kind)[:, 0][
                    torch.randperm(int(tokens[kind]), generator=generator)[:50]
                ]
                for kind in (VISION, ANSWER)
            ]
        )
        values, deviation = estimate(errors[:, drawn], classes[drawn], tokens=tokens, weigh=weigh)
        apart.append(float(values[1] - values[0]))
        missed = abs(apart[-1] - float(truth[1] - truth[0]))
        inside += missed <= 2 * float(deviation.max())
    assert sum(apart) / 400 == pytest.approx(float(truth[1] - truth[0]), rel=0.05)
    assert 0.92 < inside / 400 < 0.98


def test_a_race_drops_the_clearly_worse_and_keeps_their_distance() -> None:
    """Token errors 1, 2, 5 and 1 + 1e-3 at every token: the first two steps see 4 and 8 of 16 tokens."""
    levels = [2.0, 1.0, 5.0, 1.001]
    counts = (4, 8, 16)
    steps = [
        step_of(torch.full((count,), ANSWER, dtype=torch.int8), keep)
        for count, keep in zip(counts, (3, 2, 1), strict=True)
    ]
    asked: list[tuple[int, int]] = []

    def errors_of(place: int, excerpts: Sequence[Excerpt]) -> Tensor:
        size = len(excerpts[0].classes)
        asked.append((size, place))
        # Each step sees errors that are 10 % larger than the one before.
        return torch.full((size,), levels[place] + size / 10, dtype=torch.float64)

    tokens = torch.tensor([0.0, 0, 0, 16], dtype=torch.float64)
    weigh = torch.tensor([0.0, 0, 0, 1 / 16], dtype=torch.float64)
    found = race(steps, errors_of, candidates=4, tokens=tokens, weigh=weigh)
    assert asked == [(4, 0), (4, 1), (4, 2), (4, 3), (8, 0), (8, 1), (8, 3), (16, 1), (16, 3)]
    assert found.last.tolist() == [False, True, False, True]
    assert found.values.tolist() == pytest.approx([3.6, 2.6, 6.6, 2.601])
    assert (found.seen, found.last_seen) == (4, 16)
    assert found.totals[1].tolist() == pytest.approx([0, 0, 0, 16 * 2.6])


def found_by_package(
    model: LoadedModel, inputs: list[ModelInputs], tokens: int | str
) -> tuple[Mapping[tuple[int, str], float], list[dict[str, float]]]:
    """Exponent by layer and unit, and the ratios of every layer."""
    recipe = Recipe(
        scheme=SCHEMES["w3a16"],
        group_size=64,
        switches=METHODS["mbq"].resolve({"tokens": tokens}),
    )
    scales = calibrate(model, inputs, recipe)
    chosen = {
        (unit["layer"], unit["unit"]): unit["alpha"]
        for unit in scales.calib["units"]
        if unit["alpha"] is not None
    }
    return chosen, [layer["r"] for layer in scales.sensitivity["layers"]]


def found_naively(
    model: LoadedModel, inputs: list[ModelInputs], ratios: list[dict[str, float]]
) -> dict[tuple[int, str], naive.Choice]:
    stream = BlockStream(model)
    batches = stream.begin(inputs)
    rows = [batch.hidden for batch in batches]
    found = {}
    for layer, r in enumerate(ratios):
        feed = [
            naive.Batch(rows=x, arguments=b.arguments[layer], classes=b.classes)
            for b, x in zip(batches, rows, strict=True)
        ]
        with stream.block(layer) as block:
            choices, rows = naive.search_block(block, feed, r, bits=3, group_size=64)
        found |= {(layer, unit): choice for unit, choice in choices.items()}
    return found


def test_on_all_tokens_the_search_chooses_what_the_naive_one_does() -> None:
    model = tiny_model()
    inputs = questions(model, 12)
    chosen, ratios = found_by_package(model, inputs, "all")
    wanted = found_naively(model, inputs, ratios)
    assert chosen == {place: choice.alpha for place, choice in wanted.items()}
    assert len(set(chosen.values())) > 1


@pytest.mark.slow
def test_on_few_tokens_the_search_chooses_nearly_what_the_naive_one_does() -> None:
    model = sample_model()
    inputs = questions(model, 24)
    chosen, ratios = found_by_package(model, inputs, 512)
    wanted = found_naively(model, inputs, ratios)
    assert chosen.keys() == wanted.keys()
    same = [chosen[place] == choice.alpha for place, choice in wanted.items()]
    excess = [
        choice.curve[naive.GRID.index(chosen[place])] / min(choice.curve) - 1
        for place, choice in wanted.items()
    ]
    assert sum(same) >= SAME_SHARE * len(same)
    assert max(excess) <= MISSED
