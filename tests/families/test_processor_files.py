"""Tokenizer, template and picture settings that do not fit the model are named."""

import json
import shutil
from pathlib import Path

import pytest

from mbq_export.errors import FormatError
from mbq_export.families.inputs import Processor
from mbq_export.families.llava_onevision import FAMILY
from tests.families.random_models import SAMPLE, edit_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(SAMPLE, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "m"


def refused(folder: Path, code: str, said: str) -> FormatError:
    with pytest.raises(FormatError, match=said) as caught:
        Processor.from_folder(folder, FAMILY)
    assert caught.value.code == code
    return caught.value


def edit_settings(folder: Path, **changes: object) -> None:
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"] |= changes
    path.write_text(json.dumps(settings))


def test_missing_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refused(folder, "E4201", "There is no file 'tokenizer.json'")


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"model": {"vocab": 5}}', '{"model": {}, "model": {}}']
)
def test_damaged_tokenizer_is_refused(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    refused(folder, "E4201", "tokenizer.json")


def test_tokenizer_of_half_a_gigabyte_is_not_read(folder: Path) -> None:
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(500 << 20)
    refused(folder, "E4201", "has 524288000 bytes")


def test_tokenizer_larger_than_the_embedding_is_refused_with_both_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 60
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "E4201", "The tokenizer knows 61 tokens, and the embedding has 60 rows")


def test_embedding_larger_than_the_tokenizer_is_usual(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 640
    (folder / "config.json").write_text(json.dumps(config))
    assert Processor.from_folder(folder, FAMILY).image_token_id == 2


def test_image_token_of_another_id_is_refused_with_both_ids(folder: Path) -> None:
    edit_json(folder / "config.json", image_token_index=7)
    refused(folder, "E4202", "'<image>' has id 2 in the tokenizer and 7 in config.json")


def test_image_token_the_tokenizer_does_not_know_is_refused(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text().replace("<image>", "<picture>")
    (folder / "tokenizer.json").write_text(text)
    edit_json(folder / "tokenizer_config.json", image_token=None)
    refused(folder, "E4202", "has id None in the tokenizer")


def test_patches_of_another_size_are_refused_with_both_counts(folder: Path) -> None:
    edit_json(folder / "processor_config.json", num_image_tokens=9)
    error = refused(folder, "E4203", "processor_config.json counts 9 features per tile")
    assert "expects 36" in error.why


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": {"height": 96, "width": 96}}, "makes tiles of {'height': 96, 'width': 96}"),
        ({"size": {"height": 48, "width": 96}}, "makes tiles of"),
        ({"image_grid_pinpoints": [[48, 96]]}, "has other image_grid_pinpoints"),
    ],
)
def test_picture_settings_of_another_model_are_refused(
    folder: Path, changes: dict[str, object], said: str
) -> None:
    edit_settings(folder, **changes)
    refused(folder, "E4203", said)


def test_missing_picture_settings_are_named(folder: Path) -> None:
    (folder / "processor_config.json").unlink()
    refused(folder, "E4203", "m has no picture settings")


def test_settings_of_earlier_releases_are_read(folder: Path) -> None:
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings.pop("image_processor")))
    settings.pop("video_processor")
    (folder / "processor_config.json").write_text(json.dumps(settings))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    processor = Processor.from_folder(folder, FAMILY)
    assert processor.inputs("what is it ?").input_ids.tolist() == [4, 57, 39, 6, 19, 5]


def test_template_of_the_tokenizer_is_used_where_there_is_no_other(folder: Path) -> None:
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    assert Processor.from_folder(folder, FAMILY).inputs("yes ?").input_ids.tolist() == [
        4,
        60,
        19,
        5,
    ]


def test_missing_template_is_named_with_the_places_searched(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    error = refused(folder, "E4205", "m has no chat template")
    assert error.why == "searched: chat_template.jinja, chat_template.json, tokenizer_config.json"


def test_template_of_two_megabytes_is_not_read(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(" " * (2 << 20))
    refused(folder, "E4205", "has 2097152 bytes")


def test_every_end_of_turn_token_of_every_file_counts(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=[1, 6])
    assert Processor.from_folder(folder, FAMILY).eos_ids == {1, 6}


def test_model_without_end_of_turn_token_is_refused(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=None)
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = None
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "E4201", "names no end-of-turn token")


def test_template_that_does_not_end_answers_is_refused(folder: Path) -> None:
    text = (folder / "chat_template.jinja").read_text().replace("' <eos>'", "' .'")
    (folder / "chat_template.jinja").write_text(text)
    processor = Processor.from_folder(folder, FAMILY)
    with pytest.raises(FormatError, match="does not end an answer") as caught:
        processor.inputs("is there a star ?", answer="no")
    assert caught.value.code == "E4205"
