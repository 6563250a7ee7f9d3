"""QuantCheckpoint -> a folder that other engines read: the same codes in a format of theirs.

<out>/config.json          the model's, with the ``quantization_config`` of the format
*.safetensors        codes, scales and zero points; every other tensor as the checkpoint has it
tokenizer, processor and licence files
mbq-origin.json      which checkpoint it was made of, for people and for ``--force``
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from mbq_export import __version__
from mbq_export.checkpoint import CHECKPOINT_FILE
from mbq_export.errors import UsageError, located
from mbq_export.progress import Progress, silent
from mbq_export.quantize.formats.base import BIAS, Kept
from mbq_export.quantize.write import write_model_folder
from mbq_export.reading import sha256_of
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import group_name
from mbq_export.writing import json_bytes, partial_path, publish, refuse_existing, write_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from mbq_export.checkpoint import QuantCheckpoint
    from mbq_export.quantize.formats.base import ForeignFormat

ORIGIN_FILE: Final = "mbq-origin.json"
SCHEMA: Final = "mbq-export/interchange@1"
METADATA: Final = {"format": "pt"}
SETTINGS: Final = "quantization_config"


def hand_over(
    checkpoint: QuantCheckpoint,
    form: ForeignFormat,
    out: Path,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> None:
    """Write a checkpoint in a format of others.

    Args:
        checkpoint: Opened.
        form: One of `formats.FORMATS`.
        out: Folder to make; appears only when complete.
        force: Replace a folder that this function made.
        progress: Called after each linear.

    Raises:
        UsageError: E2006 if the format cannot hold the checkpoint, E2011 if ``out`` is taken.
        FormatError: E4411 if the checkpoint's values are bad.
        ResourceError: E5001 or E5008.
    """
    check_holds(checkpoint, form)
    refuse_existing(out, record=ORIGIN_FILE, force=force)
    scheme = SCHEMES[checkpoint.scheme_name]
    bare = {key: value for key, value in checkpoint.config.items() if key != SETTINGS}
    settings = form.config(scheme, checkpoint.group_size, _kept(checkpoint))
    staged = partial_path(out)
    write_model_folder(
        staged,
        _pieces(checkpoint, form, progress),
        config={**bare, SETTINGS: settings},
        source=checkpoint.folder,
        metadata=METADATA,
    )
    origin = {
        "schema": SCHEMA,
        "tool": {"name": "mbq-export", "version": __version__},
        "format": form.name,
        "scheme": dict(checkpoint.info["scheme"]),
        "method": dict(checkpoint.info["method"]),
        "checkpoint_sha256": sha256_of(checkpoint.folder / CHECKPOINT_FILE),
    }
    write_file(staged / ORIGIN_FILE, json_bytes(origin))
    publish(staged, out)


def check_holds(checkpoint: QuantCheckpoint, form: ForeignFormat) -> None:
    """Refuse a checkpoint that a format cannot hold.

    Raises:
        UsageError: E2006.
    """
    if checkpoint.info.get("lm_head") is not None:
        raise UsageError(
            "E2006",
            f"{form.name} cannot hold this checkpoint: its output head is codes.",
            why="engines that read the format expect a head of numbers",
            fix=("quantize with --lm-head-bits 16", "--to onnx"),
        )
    if checkpoint.tower:
        raise UsageError(
            "E2006",
            f"{form.name} cannot hold this checkpoint: its vision tower is codes.",
            why="engines that read the format expect a tower of numbers",
            fix=("quantize with --vision-bits 16", "--to onnx"),
        )
    kinds = {(record.scheme.name, record.group_size) for record in checkpoint.records.values()}
    wanted = (checkpoint.scheme_name, checkpoint.group_size)
    if checkpoint.scheme_name not in form.schemes or kinds != {wanted}:
        found = ", ".join(
            sorted(f"{name} {group_name(size)}" for name, size in kinds) or ["no codes at all"]
        )
        raise UsageError(
            "E2006",
            f"{form.name} cannot hold this checkpoint: it has {found}.",
            why=f"{form.name} holds {', '.join(form.schemes)}, all linears alike",
            fix=("--to compressed-tensors", "--to onnx", "quantize with --scheme w4a16"),
        )
    for record in checkpoint.records.values():
        with located(record.name):
            form.check(record.n, record.k, record.scheme)


def _pieces(
    checkpoint: QuantCheckpoint, form: ForeignFormat, progress: Progress
) -> Iterator[dict[str, NDArray[Any]]]:
    """Linear after linear, then the rest, raw: bfloat16 stays bfloat16."""
    for done, (name, record) in enumerate(checkpoint.records.items(), 1):
        parts = form.write(checkpoint.packed(name), record.scheme)
        piece = {f"{name}.{part}": array for part, array in parts.items()}
        if record.bias:
            piece |= {f"{name}.{BIAS}": _raw(checkpoint, f"{name}.{BIAS}")}
        yield piece
        progress(done, len(checkpoint.records), name)
    yield {name: _raw(checkpoint, name) for name in checkpoint.tensors}


def _raw(checkpoint: QuantCheckpoint, name: str) -> NDArray[Any]:
    return checkpoint.files[name].array(name)


def _kept(checkpoint: QuantCheckpoint) -> Kept:
    """Modules that are no codes: everything with a matrix, and a tied head."""
    weight = ".weight"
    modules = {
        name.removesuffix(weight)
        for name in (*checkpoint.tensors, *checkpoint.tied)
        if name.endswith(weight)
        and (name in checkpoint.tied or len(checkpoint.files[name].entries[name].shape) > 1)
    }
    patterns = {row["pattern"].removesuffix(".*") for row in checkpoint.info["skipped"]}
    heads = {name.removesuffix(weight) for name in checkpoint.tied}
    return Kept(patterns=tuple(sorted(patterns | heads)), modules=tuple(sorted(modules)))
