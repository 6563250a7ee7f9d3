"""What quantization hands to export: codes, scales and zero points of all linears, and the rest of the model.

::

    <checkpoint>/mbq.json                         what it is, one record per linear, hashes of all files
                 model-00001-of-0000n.safetensors ...   model.safetensors.index.json
                 config.json                      the model's, with ``quantization_config``
                 tokenizer and processor files    as in the model's folder

Per quantized linear: ``qweight`` I32 (N, ceil(K * bits / 32)), ``scales`` F16 (N, G) or per channel F32 (N, 1),
``zeros`` U8 (N, G) unless the scheme is symmetric, ``bias``. Channel scales are already folded into the weights and norms around. Every other tensor has the
dtype it has in the model's own files if that holds the value exactly, otherwise float32: folding never
rounds, so full-precision model, torch oracle and graphs differ by the codes alone
(docs/decisions/0007-folded-tensors-keep-float32.md).

Deterministic: sorted keys, no times, no hosts, no absolute paths. Reading needs numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np

from mbq_export.errors import FormatError, IncompatibleError, UsageError, located
from mbq_export.reading import contained, read_json, sha256_of
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL, PackedWeight, QuantScheme, check_packed
from mbq_export.schemes.layouts.dense import LAYOUT, words_per_row
from mbq_export.tensor_file import BFLOAT16, TensorFile

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

CHECKPOINT_FILE: Final = "mbq.json"
CONFIG_FILE: Final = "config.json"
INDEX_FILE: Final = "model.safetensors.index.json"
SCHEMA: Final = "mbq-export/checkpoint"
SCHEMA_MAJOR: Final = 1
KEPT: Final = "none"
"""Name that stands for "no linear is quantized": the full-precision baseline."""

JSON_LIMIT_BYTES: Final = 64 << 20
FLOATS: Final = ("F16", "BF16", "F32")
_PARTS: Final = (".qweight", ".scales", ".zeros", ".bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRecord:
    """What `CHECKPOINT_FILE` says about one quantized linear, checked.

    Attributes:
        name: Module path.
        n: Output features.
        k: Input features.
        scheme: Its number format.
        group_size: Columns that share a scale, or `CHANNEL`.
        bias: Whether it has one.
    """

    name: str
    n: int
    k: int
    scheme: QuantScheme
    group_size: int
    bias: bool

    @property
    def parts(self) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        """Allowed dtypes and shape of each tensor it has, by full name."""
        channel = self.group_size == CHANNEL
        groups = 1 if channel else self.k // self.group_size
        parts: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
            "qweight": (("I32",), (self.n, words_per_row(self.k, self.scheme.weight_bits))),
            "scales": (("F32" if channel else "F16",), (self.n, groups)),
        }
        if not self.scheme.symmetric:
            parts["zeros"] = (("U8",), (self.n, groups))
        if self.bias:
            parts["bias"] = (FLOATS, (self.n,))
        return {f"{self.name}.{part}": wanted for part, wanted in parts.items()}


@dataclass(frozen=True, kw_only=True)
class QuantCheckpoint:
    """All quantized linears and the untouched rest of the model, read from mapped files when asked for.

    Attributes:
        folder: Where it lies.
        info: Parsed `CHECKPOINT_FILE`.
        config: The model's config.json.
        records: The quantized linears by module path, in model order.
        files: The mapped file that holds a tensor, by the tensor's full name.
    """

    folder: Path
    info: Mapping[str, Any]
    config: Mapping[str, Any]
    records: Mapping[str, LinearRecord]
    files: Mapping[str, TensorFile]

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> QuantCheckpoint:
        """Open and check, in this order (FORMATS 13.1): schema, paths, sizes, hashes, linears.

        Args:
            folder: As `quantize` wrote it.
            verify: Also compare every file's hash and check the values of every linear.

        Raises:
            FormatError: E4001 if this is no checkpoint, E4604 for a malformed `CHECKPOINT_FILE`, E4605 for a
                path that leaves the folder, E4601 for a missing file, E4602 for a changed one, E4101 to E4106
                for tensors, E4411 for a value out of range.
            IncompatibleError: E7004 for a newer schema, E7005 for an unknown layout version.
        """
        info = _read_info(folder)
        records = _records(info)
        _check_files(folder, info["files"], verify=verify)
        files = _tensor_files(folder, info["files"])
        for record in records.values():
            with located(record.name):
                _check_parts(record, files)
        config = read_json(folder / CONFIG_FILE, code="E4002")
        checkpoint = cls(folder=folder, info=info, config=config, records=records, files=files)
        if verify:
            for name in checkpoint.linears:
                checkpoint.packed(name)
        return checkpoint

    @property
    def scheme_name(self) -> str:
        """Name of the number format, or `KEPT`."""
        return str(self.info["scheme"]["name"])

    @property
    def group_size(self) -> int:
        """Columns that share a scale; 0 per channel, and when no linear is quantized."""
        return int(self.info["scheme"]["group_size"])

    @property
    def linears(self) -> tuple[str, ...]:
        """Full module paths of the quantized linears, in model order."""
        return tuple(self.records)

    @property
    def tower(self) -> tuple[str, ...]:
        """Full module paths of those of the vision tower, which every form of a graph holds alike."""
        return tuple((self.info.get("vision") or {}).get("linears", ()))

    @property
    def tensors(self) -> tuple[str, ...]:
        """Full names of the untouched tensors, sorted; nothing of a quantized linear is among them."""
        parts = {part for record in self.records.values() for part in record.parts}
        return tuple(sorted(self.files.keys() - parts))

    @property
    def tied(self) -> Mapping[str, str]:
        """Names that stand for another tensor: a tied head for the embedding."""
        tied: dict[str, str] = self.info["tied"]
        return tied

    def has(self, name: str) -> bool:
        """Whether `tensor` knows a name, for example ``lm_head.weight``, tied heads included."""
        name = self.tied.get(name, name)
        return name in self.files and self.files[name].entries[name].dtype in FLOATS

    def tensor(self, name: str) -> NDArray[np.floating]:
        """Untouched tensor, or bias of a quantized linear, by its module path; a tied head is the embedding.

        Returns:
            float16 or float32 as stored (bfloat16 is widened to float32), read-only.

        Raises:
            FormatError: E4103 if there is none of that name.
        """
        if not self.has(name):
            raise FormatError(
                "E4103",
                f"The checkpoint has no tensor {name!r}.",
                why=f"it holds {len(self.tensors)} tensors beside {len(self.linears)} quantized linears",
                fix="quantize the model again",
            )
        name = self.tied.get(name, name)
        array = self.files[name].array(name)
        return array.astype(np.float32) if array.dtype == BFLOAT16 else array

    def packed(self, name: str) -> PackedWeight:
        """One quantized linear by its module path; arrays are read-only views of the mapped file.

        Raises:
            FormatError: E4103 if it is no quantized linear, E4411 if its values are bad.
        """
        with located(name):
            weight = self._mapped(name)
            check_packed(weight)
        return weight

    def rows(self, name: str, start: int, stop: int) -> PackedWeight:
        """Rows ``start`` to ``stop`` of a quantized linear, bias included; values are not checked again."""
        whole = self._mapped(name)
        return replace(
            whole,
            words=whole.words[start:stop],
            scales=whole.scales[start:stop],
            zeros=None if whole.zeros is None else whole.zeros[start:stop],
            bias=None if whole.bias is None else whole.bias[start:stop],
        )

    def _mapped(self, name: str) -> PackedWeight:
        record = self.records.get(name)
        if record is None:
            raise FormatError(
                "E4103",
                f"{name!r} is no quantized linear of the checkpoint.",
                why=f"it has {len(self.records)}, for example {next(iter(self.records), 'none')}",
                fix="quantize the model again",
            )
        arrays = {
            part.rpartition(".")[2]: self.files[part].array(part)
            for part in record.parts
            if not part.endswith(".bias")
        }
        return PackedWeight(
            words=arrays["qweight"].view(np.uint32),
            scales=arrays["scales"],
            zeros=arrays.get("zeros"),
            k=record.k,
            bits=record.scheme.weight_bits,
            group_size=record.group_size,
            bias=self.tensor(f"{name}.bias") if record.bias else None,
        )


def activation_of(scheme: QuantScheme | None) -> dict[str, Any] | None:
    """What `CHECKPOINT_FILE` says about activations: null where they are left alone."""
    if scheme is None or not scheme.rounds_activations:
        return None
    return {"bits": scheme.act_bits, "granularity": "token", "symmetric": True, "dynamic": True}


def _read_info(folder: Path) -> dict[str, Any]:
    if not (folder / CHECKPOINT_FILE).is_file():
        inside = next(folder.glob(f"*/{CHECKPOINT_FILE}"), None)
        raise FormatError(
            "E4001",
            f"There is no {CHECKPOINT_FILE} in {folder}.",
            why="a quantized checkpoint is a folder as quantize writes it",
            fix=f"use {inside.parent}"
            if inside
            else "mbq-export quantize --model MODEL --scales DIR -o DIR",
        )
    info = read_json(folder / CHECKPOINT_FILE, limit=JSON_LIMIT_BYTES, code="E4604")
    name, _, major = str(info.get("schema")).partition("@")
    if name != SCHEMA or not major.isdecimal():
        _malformed(f"its schema is {info.get('schema')!r}")
    if int(major) > SCHEMA_MAJOR:
        raise IncompatibleError(
            "E7004",
            f"The checkpoint has schema {info['schema']!r}.",
            why=f"this release reads up to {SCHEMA}@{SCHEMA_MAJOR}",
            fix="use the release of mbq-export that wrote it",
        )
    _check_shape(info)
    if info["layout"]["name"] != LAYOUT.name:
        _malformed(f"its layout is {info['layout']['name']!r}")
    LAYOUT.check_version(info["layout"]["version"])
    return info


def _check_shape(info: dict[str, Any]) -> None:
    """Check the types of everything that a reader relies on."""
    wanted: dict[str, tuple[type, dict[str, type]]] = {
        "scheme": (dict, {"name": str, "group_size": int}),
        "layout": (dict, {"name": str, "version": int}),
        "model": (dict, {"family": str}),
        "linears": (list, {"name": str, "n": int, "k": int, "scheme": str, "group_size": int, "bias": bool}),
        "files": (list, {"path": str, "bytes": int, "sha256": str}),
        "tied": (dict, {}),
    }  # fmt: skip
    for key, (kind, members) in wanted.items():
        value = info.get(key)
        if not isinstance(value, kind):
            _malformed(f"{key} is not of type {kind.__name__}")
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict):
                _malformed(f"an entry of {key} is not an object")
            for name, member in members.items():
                if type(item.get(name)) is not member:
                    _malformed(f"{name} in {key} is not of type {member.__name__}")
    if not all(isinstance(target, str) for target in info["tied"].values()):
        _malformed("tied does not map names to names")
    if not isinstance(info.get("vision"), dict | None):
        _malformed("vision is no object")


def _records(info: dict[str, Any]) -> dict[str, LinearRecord]:
    records = {}
    for row in info["linears"]:
        name, n, k, group_size = row["name"], row["n"], row["k"], row["group_size"]
        if row["scheme"] not in SCHEMES.names():
            _malformed(f"{name} has the unknown scheme {row['scheme']!r}")
        if name in records:
            _malformed(f"{name} is listed twice")
        scheme = SCHEMES[row["scheme"]]
        if n < 1 or k < 1 or not _fits(scheme, k, group_size):
            _malformed(f"{name} has {n} x {k} weights of {scheme.name} in groups of {group_size}")
        records[name] = LinearRecord(
            name=name, n=n, k=k, scheme=scheme, group_size=group_size, bias=row["bias"]
        )
    _check_activation(info, records)
    return records


def _fits(scheme: QuantScheme, k: int, group_size: int) -> bool:
    try:
        scheme.check_columns(k, group_size)
    except UsageError:
        return False
    return True


def _check_activation(info: dict[str, Any], records: Mapping[str, LinearRecord]) -> None:
    """Linears that round activations do it in the one way that this release computes, and say so."""
    tower = (info.get("vision") or {}).get("linears", ())
    schemes = [record.scheme for record in records.values() if record.name not in tower]
    wanted = activation_of(next((each for each in schemes if each.rounds_activations), None))
    found = info["scheme"].get("activation")
    if found != wanted:
        _malformed(f"activation is {found!r}, its linears are of {wanted!r}")


def _check_files(folder: Path, rows: list[dict[str, Any]], *, verify: bool) -> None:
    paths = [contained(folder, row["path"], code="E4605", missing="E4601") for row in rows]
    for path, row in zip(paths, rows, strict=True):
        if path.stat().st_size != row["bytes"]:
            _changed(row, f"{path.stat().st_size} bytes instead of {row['bytes']}")
    for path, row in zip(paths, rows, strict=True):
        if verify and sha256_of(path) != row["sha256"]:
            _changed(row, "other content")
    if CONFIG_FILE not in {row["path"] for row in rows}:
        _malformed(f"{CONFIG_FILE} is not among its files")


def _tensor_files(folder: Path, rows: list[dict[str, Any]]) -> dict[str, TensorFile]:
    found: dict[str, TensorFile] = {}
    for row in rows:
        if not row["path"].endswith(".safetensors"):
            continue
        file = TensorFile(folder / row["path"])
        for name in file.entries:
            if name in found:
                raise FormatError(
                    "E4105",
                    f"Tensor {name!r} is in {found[name].path.name} and in {row['path']}.",
                    why="a tensor lies in one file",
                    fix="quantize the model again",
                )
            found[name] = file
    return found


def _check_parts(record: LinearRecord, files: Mapping[str, TensorFile]) -> None:
    for part, (dtypes, shape) in record.parts.items():
        if part not in files:
            raise FormatError(
                "E4103",
                f"There is no tensor {part!r}.",
                why=f"a {record.scheme.name} linear has {', '.join(record.parts)}",
                fix="quantize the model again",
            )
        entry = files[part].entries[part]
        if entry.dtype not in dtypes or entry.shape != shape:
            raise FormatError(
                "E4102",
                f"Tensor {part!r} is {entry.dtype} {entry.shape}.",
                why=f"expected {' or '.join(dtypes)} {shape}",
                fix="quantize the model again",
            )


def _changed(row: Mapping[str, Any], what: str) -> NoReturn:
    raise FormatError(
        "E4602",
        f"{row['path']} changed: {what}.",
        why=f"size and SHA-256 must be those in {CHECKPOINT_FILE}",
        fix="copy the checkpoint again, or quantize the model again",
    )


def _malformed(what: str) -> NoReturn:
    raise FormatError(
        "E4604",
        f"{CHECKPOINT_FILE} is malformed: {what}.",
        why=f"this release reads {SCHEMA}@{SCHEMA_MAJOR} as docs/formats/checkpoint.md describes it",
        fix="quantize the model again",
    )
