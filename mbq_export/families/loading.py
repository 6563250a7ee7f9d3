"""Build a transformers model whose weights go from the files into place, once.

1  config.json, read strictly         nothing of the folder is run, nothing is allocated by its numbers
2  the model without storage          torch's meta device; gives the names and shapes to expect
3  headers of all weight files        compared with 2: missing, extra, wrong shape
4  tensors, one at a time             read, cast, put in place
"""

import copy
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from huggingface_hub.errors import StrictDataclassError

from mbq_export.errors import FormatError
from mbq_export.families.base import Config, ModelFamily
from mbq_export.families.processor_files import GENERATION
from mbq_export.families.weights import Renames, SourceWeights, compare, shortened
from mbq_export.reading import contained, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

DTYPES: Final = ("float32", "float16", "bfloat16")


def refuse_quantized(folder: Path, config: Config) -> None:
    """Refuse a folder whose weights are codes, not numbers.

    Raises:
        FormatError: E4009.
    """
    found = config.get("quantization_config") or config.get("text_config", {}).get(
        "quantization_config"
    )
    ours = (folder / "mbq.json").exists()
    if not found and not ours:
        return
    method = (
        "mbq"
        if ours
        else found.get("quant_method", "unknown")
        if isinstance(found, dict)
        else found
    )
    raise FormatError(
        "E4009",
        f"{folder.name} is already quantized (method {method}).",
        why="quantizing twice adds the errors of both",
        fix=f"mbq-export export {folder.name}"
        if ours
        else "give the 16-bit model it was made from",
    )


def native_config(config: Config, *, name: str) -> "PreTrainedConfig":
    """Hand a checked config to a class of transformers, which may refuse fields we do not read.

    Raises:
        FormatError: E4003.
    """
    import transformers

    try:
        found: PreTrainedConfig = getattr(transformers, name).from_dict(copy.deepcopy(dict(config)))
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise FormatError(
            "E4003",
            f"config.json is refused by transformers: {str(error).splitlines()[0][:200]}.",
            why="its classes read more fields than we do",
            fix="download config.json again",
        ) from error
    return found


def empty_module(config: "PreTrainedConfig", *, architecture: str, dtype: str) -> "PreTrainedModel":
    """Build a transformers model on the meta device: names, shapes and dtype, no storage."""
    import torch
    import transformers

    with torch.device("meta"):
        module: PreTrainedModel = getattr(transformers, architecture)(config)
    module.to(getattr(torch, dtype)).eval().requires_grad_(requires_grad=False)
    return module


def checked_weights(
    folder: Path,
    module: "PreTrainedModel",
    *,
    family: ModelFamily,
    renames: Renames,
    harmless: Sequence[str],
    weights: SourceWeights | None = None,
) -> SourceWeights:
    """Open the weight files, unless weights are given, and compare them with the model they should fill.

    Raises:
        FormatError: E41xx.
    """
    weights = SourceWeights.open(folder, renames=renames) if weights is None else weights
    tied = _tied_head(module, family)
    expected = {
        name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if name != tied
    }
    ignored = compare(
        weights, expected, harmless=[*harmless, *([f"^{re.escape(tied)}$"] if tied else [])]
    )
    if ignored:
        logger.info("ignored tensors of %s: %s", folder.name, shortened(ignored))
    if tied in ignored:
        _check_tie(weights, tied, f"{family.embed}.weight")
    return weights


def materialise(
    module: "PreTrainedModel",
    weights: SourceWeights,
    *,
    family: ModelFamily,
    skip: str = "",
) -> None:
    """Read the weights into a model from `empty_module`.

    Args:
        module: Changed in place; its parameters' dtype is what tensors are cast to.
        weights: Checked files.
        family: Says which tensors are tied.
        skip: Module path whose parameters stay on the meta device.
    """
    import torch

    tied = _tied_head(module, family)
    for name, empty in module.state_dict().items():
        if name == tied or (skip and name.startswith(skip + ".")):
            continue
        owner, _, leaf = name.rpartition(".")
        tensor = weights.read(name, dtype=empty.dtype)
        setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(tensor, requires_grad=False))
    _restore_buffers(module)
    if tied:
        head, embed = module.get_submodule(family.head), module.get_submodule(family.embed)
        head.weight = embed.weight


def _tied_head(module: "PreTrainedModel", family: ModelFamily) -> str:
    """Return the name of the head's weight if it is the embedding, else nothing."""
    return f"{family.head}.weight" if module.config.tie_word_embeddings else ""


def _check_tie(weights: SourceWeights, head: str, embed: str) -> None:
    """A tied head that is stored all the same must be the embedding."""
    import torch

    if not torch.equal(weights.read(head), weights.read(embed)):
        raise FormatError(
            "E4103",
            f"{head} is stored and differs from {embed}.",
            why="config.json says that head and embedding are one tensor (tie_word_embeddings)",
            fix="set tie_word_embeddings to false in config.json if the head is its own",
        )


def _restore_buffers(module: "PreTrainedModel") -> None:
    """Compute what no file stores: position numbers and rotary frequencies.

    A buffer's owner is built once more with storage, from its own config; owners are small.
    """
    owners = {name.rpartition(".")[0] for name, buffer in module.named_buffers() if buffer.is_meta}
    for path in sorted(owners):
        owner = module.get_submodule(path)
        filled = type(owner)(owner.config)
        for name, buffer in filled.named_buffers(recurse=False):
            setattr(owner, name, buffer)


def read_generation_config(folder: Path, module: "PreTrainedModel") -> None:
    """Give the model the settings of generation_config.json, if there is one.

    Raises:
        FormatError: E4002 for bad JSON or settings that transformers refuses.
    """
    from transformers import GenerationConfig

    if not (folder / GENERATION).exists():
        return
    found = read_json(contained(folder, GENERATION, code="E4105"))
    try:
        module.generation_config = GenerationConfig.from_dict(found)
    except (TypeError, ValueError) as error:
        raise FormatError(
            "E4002",
            f"{GENERATION} is refused: {str(error).splitlines()[0][:200]}.",
            why="transformers checks its fields",
            fix=f"download {GENERATION} again, or remove it",
        ) from error
