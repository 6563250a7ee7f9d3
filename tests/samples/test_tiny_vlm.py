"""The shipped sample model is the one its card describes, and its recipe still makes such a model."""

import hashlib
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor

from mbq_export.calibrate.shapes import evaluation_scenes, make_scenes
from mbq_export.evaluate.packed import (
    Accuracy,
    accuracy,
    answer_scenes,
    encoder,
    pixels_from_images,
)
from mbq_export.families.base import ANSWER, PROMPT, VISION
from mbq_export.families.inputs import Processor
from mbq_export.families.llava_onevision import FAMILY
from samples.tiny_vlm import card, stages, train
from samples.tiny_vlm.evaluate import load_model
from samples.tiny_vlm.inputs import IMAGE_TOKENS, HandMade
from samples.tiny_vlm.model import TOKEN_IDS, build_model, build_tokenizer, write_folder
from samples.tiny_vlm.stress import stressed_folder

WEIGHTS = Path(__file__).parents[2] / "samples" / "tiny_vlm" / "weights"
HASHES = {
    "chat_template.jinja": "b19d11f4cffa0d8e5fcfd0d2ccc18af9eb7b347cbbe7887f84a3a5462b1fc0a6",
    "config.json": "960b50258cd974051da2c1583f3614ecb02c9c2bf9f4ba5a4fd48327b0d7edc1",
    "generation_config.json": "d2f00f14127fe3e77d7b84ae245cacb10c265e5c4f74cb49ecea3368ddb2e010",
    "model.safetensors": "81c091ff9fd6b98e0ddfcabe9148f65052a66b798626bfc4e1903600ca849560",
    "processor_config.json": "4610dce9aad667b8927b1757d69daed37e550a84ec353ed5ce8ceff5503301e8",
    "tokenizer.json": "73eb455ee4cfd9c9bc928790235cf5cd7517cd47346fccf9a5275ee7f6620ef9",
    "tokenizer_config.json": "6a6aede01698e9c92c473a8e5be55c92fb2a171dc21491a8659ed366d53418a1",
}


@pytest.fixture(scope="module")
def processor() -> HandMade:
    return HandMade(WEIGHTS)


@pytest.fixture(scope="module")
def image() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return next(evaluation_scenes(1, seed=5)).image


def measured(images: int, seed: int) -> Accuracy:
    encode = encoder(HandMade(WEIGHTS).tokenizer)
    return accuracy(
        answer_scenes(load_model(WEIGHTS), evaluation_scenes(images, seed=seed), encode)
    )


@pytest.mark.parametrize("name", HASHES)
def test_a_shipped_file_is_the_one_on_the_card(name: str) -> None:
    assert hashlib.sha256((WEIGHTS / name).read_bytes()).hexdigest() == HASHES[name]


def test_shipped_files_are_those_with_hashes_and_the_licence() -> None:
    assert {path.name for path in WEIGHTS.iterdir()} == {*HASHES, "LICENSE.md"}


def test_at_least_nine_of_ten_questions_are_answered_exactly() -> None:
    result = measured(250, seed=0)
    assert result.questions > 1400
    assert result.exact_match > 0.90
    assert result.by_kind["count"][0] > 0.99
    assert result.by_kind["read"][0] > 0.90


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_interval_of_a_full_evaluation_lies_above_ninety_percent() -> None:
    result = measured(900, seed=0)
    assert result.questions >= 5000
    assert result.low > 0.90


def test_the_code_writes_the_settings_that_are_shipped(tmp_path: Path) -> None:
    write_folder(build_model(0), tmp_path / "model")
    for name in set(HASHES) - {"model.safetensors"}:
        made = (tmp_path / "model" / name).read_text(encoding="utf-8")
        shipped = (WEIGHTS / name).read_text(encoding="utf-8")
        if name.endswith(".json"):
            made, shipped = json.loads(made), json.loads(shipped)
            for settings in (made, shipped):
                settings.pop("transformers_version", None)
        assert made == shipped, name
    with (
        safe_open(tmp_path / "model" / "model.safetensors", "pt") as ours,
        safe_open(WEIGHTS / "model.safetensors", "pt") as theirs,
    ):
        assert set(ours.keys()) == set(theirs.keys())
        for name in ours.keys():  # noqa: SIM118  (not a mapping)
            assert ours.get_slice(name).get_shape() == theirs.get_slice(name).get_shape(), name
            assert ours.get_slice(name).get_dtype() == "F16"


def test_the_card_holds_the_figures_of_the_records() -> None:
    assert (card.FOLDER / "README.md").read_text(encoding="utf-8") == card.current_card()


def test_the_card_counts_what_was_measured() -> None:
    part = {"exact_match": 0.5, "low": 0.25, "high": 0.75, "questions": 1234}
    rows = card.accuracy_rows([{**part, "by_kind": dict.fromkeys(card.KINDS, (0.125, 8))}])
    assert rows[0] == ["questions", "1,234"]
    assert rows[1] == ["**exact match**", "**50.00 %** [25.00, 75.00]"]
    assert rows[2] == ["count", "12.50 %"]
    assert card.table([["a", "b"], ["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |\n"


def test_every_word_is_one_token() -> None:
    tokenizer = build_tokenizer()
    assert len(tokenizer) == len(TOKEN_IDS) == 61
    assert tokenizer.convert_tokens_to_ids(list(TOKEN_IDS)) == list(range(61))
    ids = tokenizer("What color is the STAR?").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["what", "color", "is", "the", "star", "?"]


def test_inputs_need_no_torchvision(image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # Importing it fails from here on.
    sample = HandMade(WEIGHTS).inputs("what color is the star ?", image, "red")
    assert (sample.input_ids == TOKEN_IDS["<image>"]).sum() == IMAGE_TOKENS
    question = ["<q>", *["what", "color", "is", "the", "star", "?"], "<a>", "red", "<eos>"]
    assert sample.input_ids[IMAGE_TOKENS:].tolist() == [TOKEN_IDS[word] for word in question]
    wanted = [VISION] * IMAGE_TOKENS + [PROMPT] * 8 + [ANSWER] * 2
    assert sample.token_classes.tolist() == wanted
    assert sample.image_sizes.tolist() == [[48, 48]]


def test_training_and_the_picture_processor_see_the_same_pixels(
    processor: HandMade, image: Any
) -> None:
    tiles = processor.inputs("what ?", image).pixel_values
    assert tiles.shape == (2, 3, 48, 48)
    for tile in tiles:
        assert np.abs(tile - pixels_from_images(image[None])[0].numpy()).max() < 1e-6


def test_inputs_equal_those_of_the_package(processor: HandMade, image: Any) -> None:
    package = Processor.from_folder(WEIGHTS, FAMILY)
    for answer in (None, "top left red star , right blue 7"):
        ours = processor.inputs("where is the red star ?", image, answer)
        theirs = package.inputs("where is the red star ?", [Image.fromarray(image)], answer)
        assert theirs.input_ids.tolist() == ours.input_ids.tolist()
        assert theirs.token_classes.tolist() == ours.token_classes.tolist()
        assert (theirs.pixel_values == ours.pixel_values).all()
        assert theirs.image_sizes.tolist() == ours.image_sizes.tolist()
        assert theirs.tiles_per_image.tolist() == ours.tiles_per_image.tolist()


def test_inputs_equal_those_of_auto_processor(processor: HandMade, image: Any) -> None:
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision does not import here, and AutoProcessor needs it: {error}")
    auto = AutoProcessor.from_pretrained(WEIGHTS)
    content = [{"type": "image"}, {"type": "text", "text": "what color is the star ?"}]
    text = auto.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    theirs = auto(images=[Image.fromarray(image)], text=[text], return_tensors="np")
    ours = processor.inputs("what color is the star ?", image)
    assert theirs["input_ids"][0].tolist() == ours.input_ids.tolist()
    assert np.abs(theirs["pixel_values"][0] - ours.pixel_values).max() < 1e-6


def steps(stage: stages.Stage, count: int) -> list[float]:
    return [stage.step(number) for number in range(count)]


def test_twenty_steps_of_the_first_stage_learn_something() -> None:
    model = build_model(0)
    losses = steps(stages.probe_stage(model, stages.Probe(128)), 20)
    assert np.mean(losses[-3:]) < 0.75 * losses[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_steps_of_every_stage_learn_and_leave_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    arguments = ["train", "--out", str(out), "--steps", "20", "--evaluation-images", "10"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--threads", str(torch.get_num_threads())])
    monkeypatch.setattr(train, "EVERY", {"probe": 10, "align": 10, "answer": 10})
    monkeypatch.setattr(train, "MONITOR_IMAGES", 10)
    train.main()
    record = json.loads((out / "training.json").read_text(encoding="utf-8"))
    assert [stage["name"] for stage in record["stages"]] == ["probe", "align", "answer"]
    for stage in record["stages"]:
        assert [entry["step"] for entry in stage["log"]] == [10, 20]
        assert stage["log"][1]["loss"] < stage["log"][0]["loss"], stage["name"]
        assert stage["wall_s"] > 0
        assert stage["cpu_s"] > 0
    assert record["evaluation"]["images"] == 10
    assert HandMade(out / "model").tokenizer.vocab_size == 61
    assert load_model(out / "model").config.text_config.num_hidden_layers == 5


@pytest.mark.parametrize("name", ["probe", pytest.param("answer", marks=pytest.mark.slow)])
def test_a_run_that_was_cut_off_ends_where_an_uncut_one_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "EVERY", {name: 2})
    monkeypatch.setattr(train, "MONITOR_IMAGES", 4)
    whole = train.Run(tmp_path / "whole", seed=0)
    whole.train(whole.stage(name, 4))
    first = train.Run(tmp_path / "cut", seed=0)
    begun = first.stage(name, 4)
    steps(begun, 2)
    entry = {"name": name, "wall_s": 0.0, "cpu_s": 0.0, "log": []}
    first.record["stages"].append(entry)
    train.save_checkpoint(first, begun, 2)
    second = train.Run(tmp_path / "cut", seed=1)  # Other first weights: all must come from disk.
    reached, done, tensors = train.load_checkpoint(second)
    assert (reached, done) == (name, 2)
    rest = second.stage(name, 4)
    train.restore_optimizers(rest, tensors)
    second.train(rest, resumed_at=done)
    assert second.record["seed"] == 0
    restored = second.modules().state_dict()
    for key, tensor in whole.modules().state_dict().items():
        torch.testing.assert_close(restored[key], tensor, msg=key)


def test_the_record_of_a_run_evaluates_the_folder_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "MONITOR_IMAGES", 1)
    run = train.Run(tmp_path, seed=0)
    run.model = load_model(WEIGHTS)
    run.finish(images=20)
    record = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert record["evaluation"]["exact_match"] == pytest.approx(measured(20, seed=0).exact_match)
    assert record["evaluation"]["exact_match"] > 0.85


def test_labels_and_word_targets_say_what_a_cell_holds() -> None:
    scene = next(make_scenes(1, seed=12))
    colors, kinds = stages.cell_labels([scene])
    targets = stages.word_targets([scene])[0].view(6, 6, -1)
    words = stages.describing_words()
    for cell in range(9):
        shown = [thing for thing in scene.things if thing.cell == cell]
        row, column = divmod(cell, 3)
        patch = targets[2 * row + 1, 2 * column]
        said = {word for word, value in zip(words, patch, strict=True) if value == 1}
        if shown:
            assert {shown[0].color, shown[0].kind} <= said
            assert kinds[0, cell] == stages.KINDS.index(shown[0].kind)
        else:
            assert "nothing" in said
            assert (colors[0, cell], kinds[0, cell]) == (stages.NO_COLOR, stages.NO_KIND)
        assert set(stages.POSITIONS[cell].split()) <= said


def test_packed_attention_equals_the_one_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 8, 5, 4, generator=generator)
    key, value = (torch.randn(2, 2, 5, 4, generator=generator) for _ in range(2))
    mask = torch.zeros(2, 1, 5, 5).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -1e4)
    ours, _ = stages.packed_attention(torch.nn.Identity(), query, key, value, mask, scaling=0.5)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.5, enable_gqa=True
    )
    torch.testing.assert_close(ours, theirs.transpose(1, 2))


def test_rates_warm_up_stay_flat_and_fall_to_the_floor() -> None:
    rate = stages.schedule(warm_up=10, flat=0.5, floor=0.01)
    assert rate(0.0, 0) == pytest.approx(0.1)
    assert rate(0.4, 40) == pytest.approx(1.0)
    assert rate(0.75, 75) == pytest.approx(0.01 + 0.99 * 0.5)
    assert rate(1.0, 100) == pytest.approx(0.01)


def test_a_stressed_folder_is_labelled_and_answers_alike(tmp_path: Path) -> None:
    out = tmp_path / "stressed"
    shutil.rmtree(out, ignore_errors=True)
    places = stressed_folder(WEIGHTS, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["synthetic_outliers"]["vision_gain"] == 40.0
    assert config["dtype"] == "float32"
    assert "Synthetic outliers" in (out / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in out.iterdir()} == {*HASHES, "LICENSE.md", "README.md"}
    assert not list(tmp_path.glob("*.partial"))
    assert len(places) == 15
    scenes = list(evaluation_scenes(30, seed=5))
    encode = encoder(HandMade(out).tokenizer)
    plain, harder = (answer_scenes(load_model(f), scenes, encode) for f in (WEIGHTS, out))
    assert [o.correct for o in plain] == [o.correct for o in harder]
