"""Write a checkpoint folder: shards, index, configuration, companions, and last the file that describes them."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any, Final

from mbq_export.checkpoint import CHECKPOINT_FILE, CONFIG_FILE, INDEX_FILE
from mbq_export.reading import sha256_of
from mbq_export.tensor_file import write_tensors
from mbq_export.writing import explained, json_bytes, write_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

SHARD_BYTES: Final = 2 << 30
METADATA: Final = {"format": "pt", "mbq": "1"}
COMPANIONS: Final = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "LICENSE*",
    "NOTICE*",
)
"""Files of a model folder that travel with its checkpoint unchanged, as patterns."""


def write_checkpoint(
    staged: Path,
    tensors: Iterable[Mapping[str, NDArray[Any]]],
    *,
    info: Mapping[str, Any],
    config: Mapping[str, Any],
    source: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder under a name that nobody reads, for its caller to publish.

    Args:
        staged: The folder; whatever is there is removed first.
        tensors: By full name, in pieces; a piece is never split over shards.
        info: `mbq.json` without ``files`` and without the file of each linear.
        config: The model's config.json with ``quantization_config``.
        source: The model's folder, for tokenizer, processor and licence files.
        shard_bytes: Largest size of a shard, unless one piece is larger.

    Raises:
        ResourceError: E5001 or E5008.
    """
    places = write_model_folder(
        staged, tensors, config=config, source=source, metadata=METADATA, shard_bytes=shard_bytes
    )
    linears = [{**row, "file": places[f"{row['name']}.qweight"]} for row in info["linears"]]
    listed = {**info, "linears": linears, "files": _file_rows(staged)}
    write_file(staged / CHECKPOINT_FILE, json_bytes(listed))


def write_model_folder(
    staged: Path,
    tensors: Iterable[Mapping[str, NDArray[Any]]],
    *,
    config: Mapping[str, Any],
    source: Path,
    metadata: Mapping[str, str],
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write shards, their index, config.json and the companions of a model folder.

    Args:
        staged: The folder; whatever is there is removed first.
        tensors: By full name, in pieces; a piece is never split over shards.
        config: Content of config.json.
        source: The folder whose tokenizer, processor and licence files are copied.
        metadata: Strings for the header of each shard.
        shard_bytes: Largest size of a shard, unless one piece is larger.

    Returns:
        The file of each tensor.

    Raises:
        ResourceError: E5001 or E5008.
    """
    with explained(staged):
        if staged.exists():
            shutil.rmtree(staged)
        staged.mkdir(parents=True)
        for path in companions(source):
            shutil.copyfile(path, staged / path.name)
    places, total_bytes = _write_shards(staged, _shards(tensors, shard_bytes), metadata)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": places}
    write_file(staged / INDEX_FILE, json_bytes(index))
    write_file(staged / CONFIG_FILE, json_bytes(dict(config)))
    return places


def companions(source: Path) -> list[Path]:
    """Files of a model folder that belong to every checkpoint made of it, sorted by name."""
    found = {path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()}
    return sorted(found, key=lambda path: path.name)


def _shards(
    pieces: Iterable[Mapping[str, NDArray[Any]]], limit: int
) -> Iterator[dict[str, NDArray[Any]]]:
    """Join pieces to shards of at most ``limit`` bytes; a piece is never split."""
    shard: dict[str, NDArray[Any]] = {}
    for piece in pieces:
        size = sum(array.nbytes for array in (*shard.values(), *piece.values()))
        if shard and size > limit:
            yield shard
            shard = {}
        shard |= piece
    yield shard


def _write_shards(
    staged: Path, shards: Iterable[Mapping[str, NDArray[Any]]], metadata: Mapping[str, str]
) -> tuple[dict[str, str], int]:
    """Write the shards; return the file of each tensor, and the bytes of all tensors."""
    names: list[list[str]] = []
    total_bytes = 0
    for shard in shards:
        names.append(sorted(shard))
        total_bytes += sum(array.nbytes for array in shard.values())
        write_tensors(staged / _numbered(len(names)), shard, metadata=metadata)
    places: dict[str, str] = {}
    for number, members in enumerate(names, 1):
        # How many there are is known only now.
        final = f"model-{number:05}-of-{len(names):05}.safetensors"
        (staged / _numbered(number)).rename(staged / final)
        places |= dict.fromkeys(members, final)
    return places, total_bytes


def _numbered(number: int) -> str:
    return f"shard-{number:05}.safetensors"


def _file_rows(staged: Path) -> list[dict[str, Any]]:
    return [
        {"path": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(staged.iterdir())
    ]
