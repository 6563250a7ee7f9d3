"""Tokenizer, chat template and picture settings of a model folder, checked against its config."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mbq_export.errors import FormatError
from mbq_export.families.base import Config, VisionShape
from mbq_export.reading import contained, read_json, regular_size

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

TOKENIZER: Final = "tokenizer.json"
TOKENIZER_LIMIT: Final = 64 << 20
TEMPLATE: Final = "chat_template.jinja"
TEMPLATE_JSON: Final = "chat_template.json"
TEMPLATE_LIMIT: Final = 1 << 20
PROCESSOR: Final = "processor_config.json"
PREPROCESSOR: Final = "preprocessor_config.json"
GENERATION: Final = "generation_config.json"


def read_tokenizer(folder: Path, *, vocab: int) -> "PreTrainedTokenizerBase":
    """Read the tokenizer.

    Args:
        folder: The model folder.
        vocab: Rows of the embedding; more rows than tokens are usual, fewer are an error.

    Raises:
        FormatError: E4201.
    """
    path = contained(folder, TOKENIZER, code="E4105", missing="E4201")
    content = read_json(path, limit=TOKENIZER_LIMIT, code="E4201")
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        raise FormatError(
            "E4201",
            f"{TOKENIZER} has no model with a vocabulary.",
            why="only fast tokenizers are read, all of whose facts lie in this file",
            fix="download tokenizer.json again",
        )
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(
            "E4201",
            f"The tokenizer cannot be read: {str(error).splitlines()[0][:200]}.",
            why="tokenizer.json and tokenizer_config.json belong together",
            fix="download both again",
        ) from error
    if len(tokenizer) > vocab:
        raise FormatError(
            "E4201",
            f"The tokenizer knows {len(tokenizer)} tokens, and the embedding has {vocab} rows.",
            why="every token needs a row",
            fix="check that tokenizer.json belongs to this model",
        )
    return tokenizer


def read_template(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Read the processor's chat template; None means the tokenizer's own.

    Raises:
        FormatError: E4205 if there is neither.
    """
    if (folder / TEMPLATE).exists():
        path = contained(folder, TEMPLATE, code="E4105", missing="E4205")
        regular_size(path, code="E4205", limit=TEMPLATE_LIMIT)
        return path.read_text(encoding="utf-8", errors="replace")
    if (folder / TEMPLATE_JSON).exists():
        path = contained(folder, TEMPLATE_JSON, code="E4105", missing="E4205")
        found = read_json(path, limit=TEMPLATE_LIMIT, code="E4205").get("chat_template")
        if isinstance(found, str):
            return found
    if isinstance(tokenizer.chat_template, str):
        return None
    raise FormatError(
        "E4205",
        f"{folder.name} has no chat template.",
        why=f"searched: {TEMPLATE}, {TEMPLATE_JSON}, tokenizer_config.json",
        fix="download the folder again, with all its small files",
    )


def read_picture_processor(
    folder: Path, config: Config, shape: VisionShape
) -> "BaseImageProcessor":
    """Read the picture settings and compare them with the vision tower.

    Raises:
        FormatError: E4203.
    """
    settings, place, claimed = _picture_settings(folder)
    size = settings.get("size", {"height": 384, "width": 384})
    sides = set(size.values()) if isinstance(size, dict) else {size}
    if sides != {shape.image_size}:
        raise _other_model(f"{place} makes tiles of {size}", f"{shape.image_size} pixels a side")
    if claimed is not None and claimed != shape.tokens_per_tile + _class_token(config):
        raise _other_model(
            f"{place} counts {claimed} features per tile",
            f"{shape.tokens_per_tile} ({shape.image_size} pixels in patches of {shape.patch_size})",
        )
    pinpoints = config.get("image_grid_pinpoints")
    if pinpoints and settings.get("image_grid_pinpoints", pinpoints) != pinpoints:
        raise _other_model(f"{place} has other image_grid_pinpoints", "those of config.json")
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    try:
        found: BaseImageProcessor = LlavaOnevisionImageProcessorPil.from_dict(dict(settings))
    except (TypeError, ValueError, KeyError) as error:
        raise _other_model(
            f"{place} is refused ({error})", "settings of LLaVA-OneVision"
        ) from error
    return found


def read_image_token_id(folder: Path, config: Config, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the id that stands for one row of image features.

    Raises:
        FormatError: E4202 if config and tokenizer disagree.
    """
    stated = config.get("image_token_index", config.get("image_token_id", 151646))
    token = getattr(tokenizer, "image_token", None)
    if token is None and (folder / PROCESSOR).exists():
        token = read_json(folder / PROCESSOR, code="E4203").get("image_token")
    token = token or "<image>"
    found = tokenizer.get_vocab().get(token)
    if found is None or found != stated:
        raise FormatError(
            "E4202",
            f"The image token {token!r} has id {found} in the tokenizer and {stated} in config.json.",
            why="a picture's rows would land at the wrong tokens",
            fix="check that config.json and tokenizer.json belong together",
        )
    return int(found)


def read_eos_ids(
    folder: Path, config: Config, tokenizer: "PreTrainedTokenizerBase"
) -> frozenset[int]:
    """Collect the tokens that end a turn, as generation would.

    Raises:
        FormatError: E4201 if there is none.
    """
    found: set[int] = set()
    text = config.get("text_config")
    sources: list[Config] = [config, text if isinstance(text, dict) else {}]
    if (folder / GENERATION).exists():
        path = contained(folder, GENERATION, code="E4105", missing="E4201")
        sources.insert(0, read_json(path, code="E4201"))
    for source in sources:
        stated = source.get("eos_token_id")
        found.update(
            n for n in (stated if isinstance(stated, list) else [stated]) if type(n) is int
        )
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    if not found:
        raise FormatError(
            "E4201",
            f"{folder.name} names no end-of-turn token.",
            why=f"searched: {GENERATION}, config.json, tokenizer_config.json",
            fix="download generation_config.json again",
        )
    return frozenset(found)


def _picture_settings(folder: Path) -> tuple[dict[str, Any], str, int | None]:
    """Return picture settings, the file they came from, and the stated features per tile."""
    claimed = None
    if (folder / PROCESSOR).exists():
        path = contained(folder, PROCESSOR, code="E4105", missing="E4203")
        processor = read_json(path, code="E4203")
        claimed = processor.get("num_image_tokens")
        if isinstance(processor.get("image_processor"), dict):
            return processor["image_processor"], PROCESSOR, claimed
    if not (folder / PREPROCESSOR).exists():
        raise _other_model(
            f"{folder.name} has no picture settings", f"{PROCESSOR} or {PREPROCESSOR}"
        )
    path = contained(folder, PREPROCESSOR, code="E4105", missing="E4203")
    return read_json(path, code="E4203"), PREPROCESSOR, claimed


def _class_token(config: Config) -> int:
    """Processors count the class token that the strategy "default" drops later."""
    return int(config.get("vision_feature_select_strategy") == "default")


def _other_model(found: str, expected: str) -> FormatError:
    return FormatError(
        "E4203",
        f"{found}.",
        why=f"the vision tower of config.json expects {expected}",
        fix="check that the processor files belong to this model",
    )
