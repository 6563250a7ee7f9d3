"""The exam on the shipped sample model, against itself, a distorted copy and single questions."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from docs.benchmarks.quality import trained
from docs.benchmarks.quality_cells import SHIPPED, Cell, Setting
from docs.benchmarks.quality_run import Bench
from mbq_export.calibrate.shapes import Scene, evaluation_scenes
from mbq_export.evaluate.metrics import divergences
from mbq_export.evaluate.packed import Rows, accuracy, answer_scenes, encoder, pack
from mbq_export.evaluate.quality import (
    Exam,
    Paper,
    comparison,
    established,
    summary,
    text_masks,
)
from mbq_export.evaluate.tolerances import (
    SAMPLE_ACCURACY_FLOOR,
    SAMPLE_W3_LOSS,
    STRESS_RTN_LOSS,
)
from samples.tiny_vlm.inputs import HandMade

WEIGHTS = Path(__file__).parents[2] / "samples" / "tiny_vlm" / "weights"


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(WEIGHTS, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor() -> HandMade:
    return HandMade(WEIGHTS)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(evaluation_scenes(10, seed=5))


@pytest.fixture(scope="module")
def distorted(model: Any) -> Any:
    """The model with one decoder matrix scaled: other answers, same vision tower."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.language_model.layers[2].mlp.down_proj.weight.mul_(1.5)
    return changed


@pytest.fixture(scope="module")
def exam(model: Any, processor: HandMade, scenes: list[Scene]) -> Exam:
    return Exam(model, scenes, encoder(processor.tokenizer), batch=4)


@pytest.fixture(scope="module")
def paper(exam: Exam, distorted: Any) -> Paper:
    return exam.take(distorted)


def test_full_precision_is_at_no_distance_from_itself(exam: Exam, model: Any) -> None:
    own = exam.take(model)
    for distances in own.distances.values():
        assert distances.nats.max() < 1e-9
        assert distances.same.all()


def test_answers_are_those_of_the_packed_evaluation(
    paper: Paper, distorted: Any, processor: HandMade, scenes: list[Scene]
) -> None:
    outcomes = answer_scenes(distorted, scenes, encoder(processor.tokenizer))
    asked = [outcome for outcome in outcomes if outcome.question.kind != "caption"]
    assert paper.correct.tolist() == [outcome.correct for outcome in asked]
    assert paper.scenes.tolist() == [outcome.scene for outcome in asked]
    assert paper.kinds.tolist() == [outcome.question.kind for outcome in asked]
    assert paper.correct.mean() == pytest.approx(accuracy(outcomes).exact_match)


def test_distances_are_those_of_single_questions(
    paper: Paper, model: Any, distorted: Any, processor: HandMade, scenes: list[Scene]
) -> None:
    found: dict[str, list[np.ndarray]] = {"answer": [], "prompt": [], "vision": []}
    for scene in scenes[:3]:
        for asked in scene.questions:
            if asked.kind == "caption":
                continue
            start = len(processor.inputs(asked.text, scene.image).input_ids)
            feeds = processor.inputs(asked.text, scene.image, asked.answer).tensors()
            with torch.no_grad():
                pair = [side(**feeds).logits[0].numpy() for side in (model, distorted)]
            nats = divergences(*pair)
            found["answer"].append(nats[start - 1 : -1])
            found["prompt"].append(nats[78 : start - 1])
        found["vision"].append(nats[:78])
    for modality, parts in found.items():
        alone = np.concatenate(parts)
        packed = paper.distances[modality].nats[: len(alone)]
        np.testing.assert_allclose(packed, alone, rtol=1e-3, atol=1e-6)
    assert np.concatenate(found["answer"]).mean() > 1e-4


def test_every_position_knows_its_scene(paper: Paper, scenes: list[Scene]) -> None:
    for distances in paper.distances.values():
        assert distances.nats.shape == distances.same.shape == distances.scenes.shape
        assert set(distances.scenes) == {scene.number for scene in scenes}
    counts = np.unique(paper.distances["vision"].scenes, return_counts=True)[1]
    assert set(counts) == {78}


def test_captions_and_ends_and_padding_do_not_count(scenes: list[Scene]) -> None:
    words = {}
    rows: Rows = pack(
        [scene.questions for scene in scenes[:2]],
        lambda text: [words.setdefault(word, len(words)) for word in text.split()],
        vision_tokens=78,
    )
    masks = text_masks(scenes[:2], rows)
    for index, scene in enumerate(scenes[:2]):
        asked = [question for question in scene.questions if question.kind != "caption"]
        answers = sum(len(question.answer.split()) + 1 for question in asked)
        prompts = sum(len(question.text.split()) + 1 for question in asked)
        assert int(masks["answer"][index].sum()) == answers
        assert int(masks["prompt"][index].sum()) == prompts


def test_summary_is_what_the_paper_says(paper: Paper) -> None:
    found = summary(paper)
    assert found["accuracy"]["value"] == pytest.approx(paper.correct.mean())
    assert found["accuracy"]["low"] <= found["accuracy"]["value"] <= found["accuracy"]["high"]
    assert sum(kind["questions"] for kind in found["kinds"].values()) == found["questions"]
    answers = found["kl"]["answer"]
    assert answers["mean"]["value"] == pytest.approx(paper.distances["answer"].nats.mean())
    assert answers["median"] <= answers["p95"] <= answers["p99"]
    assert answers["same_top_token"] == pytest.approx(paper.distances["answer"].same.mean())


def test_comparison_is_second_minus_first(exam: Exam, model: Any, paper: Paper) -> None:
    own = exam.take(model)
    found = comparison(paper, own)
    gain = own.correct.mean() - paper.correct.mean()
    assert found["accuracy"]["value"] == pytest.approx(gain)
    assert found["kl"]["value"] == pytest.approx(-paper.distances["answer"].nats.mean())
    discordant = found["mcnemar"]
    assert (discordant["only_second"] - discordant["only_first"]) / len(own.correct) == (
        pytest.approx(gain)
    )


@pytest.mark.parametrize(
    ("intervals", "sign"),
    [
        ([(0.1, 0.3), (0.2, 0.4)], 1),
        ([(-0.3, -0.1), (-0.2, -0.1)], -1),
        ([(0.1, 0.3), (-0.1, 0.4)], 0),
        ([(0.1, 0.3), (-0.3, -0.1)], 0),
    ],
)
def test_a_difference_is_stated_only_if_every_seed_shows_it(
    intervals: list[tuple[float, float]], sign: int
) -> None:
    assert (
        established([{"value": 0.0, "low": low, "high": high} for low, high in intervals]) == sign
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Fewer pictures and samples than the published table, another draw."""
    setting = Setting(images=200, seed=6, samples=24)
    folder = tmp_path_factory.mktemp("quality")
    return Bench({SHIPPED: trained(WEIGHTS)}, setting, work=folder, scratch=folder)


@pytest.fixture(scope="module")
def plain(bench: Bench) -> dict[str, Paper]:
    return taken(bench, "plain", ("mbq",))


@pytest.fixture(scope="module")
def stress(bench: Bench) -> dict[str, Paper]:
    return taken(bench, "stress", ("rtn", "awq", "mbq"))


def taken(bench: Bench, variant: str, methods: tuple[str, ...]) -> dict[str, Paper]:
    """Papers of a variant by method, groups of 128, and of full precision."""
    cells = [
        Cell(model=SHIPPED, variant=variant, format="w3-g128", method=method) for method in methods
    ]
    return {cell.method: bench.paper(cell) for cell in (cells[0].full, *cells)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_w3_of_the_sample_model_costs_little(plain: dict[str, Paper]) -> None:
    full, mbq = plain["fp"].correct.mean(), plain["mbq"].correct.mean()
    assert full >= SAMPLE_ACCURACY_FLOOR
    assert full - mbq <= SAMPLE_W3_LOSS
    assert len(plain["fp"].correct) > 1000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_stress_variant_answers_like_the_sample_model(
    plain: dict[str, Paper], stress: dict[str, Paper]
) -> None:
    assert (plain["fp"].correct == stress["fp"].correct).mean() > 0.998


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["awq", "mbq"])
def test_outlier_channels_cost_rounding_what_a_search_wins_back(
    stress: dict[str, Paper], method: str
) -> None:
    rounded, searched = stress["rtn"], stress[method]
    assert searched.correct.mean() - rounded.correct.mean() >= STRESS_RTN_LOSS
    answers = {name: stress[name].distances["answer"].nats.mean() for name in ("rtn", method)}
    assert answers[method] < answers["rtn"]
