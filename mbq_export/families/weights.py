"""The weight files of a model folder: checked first, then read one tensor at a time.

    stored name                                     module path
    language_model.model.layers.0.mlp.up_proj  ──►  model.language_model.layers.0.mlp.up_proj
    (older releases of transformers)                (what every stage uses)

A tensor goes from the file straight into its own memory, so a checkpoint is never in memory twice.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mbq_export.errors import FormatError
from mbq_export.reading import (
    TensorEntry,
    contained,
    read_json,
    regular_size,
    safetensors_header,
    sha256_of,
)

if TYPE_CHECKING:
    import torch

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
INDEX_LIMIT: Final = 64 << 20
PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONVERT: Final = (
    'in an environment you trust: python -c "from transformers import AutoModel as M; '
    "M.from_pretrained('FOLDER').save_pretrained('NEW')\""
)
FLOATS: Final = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}

Renames = Sequence[tuple[str, str]]
"""Regular expressions over stored names and what replaces them; all are applied, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        path: The file.
        entry: Dtype, shape and bytes.
    """

    path: Path
    entry: TensorEntry


@dataclass(frozen=True, kw_only=True)
class SourceWeights:
    """Tensors of a model folder by module path.

    Attributes:
        folder: The model folder.
        tensors: Where each tensor lies, by module path, sorted.
        stamps: Size and time of change of each file when it was checked.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    stamps: Mapping[Path, tuple[int, int]]

    @classmethod
    def open(cls, folder: Path, *, renames: Renames = ()) -> "SourceWeights":
        """Check the headers of all weight files.

        Raises:
            FormatError: E4101 for a damaged file, E4103 for a tensor stored twice or missing from a shard,
                E4105 and E4106 for a shard that is missing or not a file inside the folder, E4107 for a
                download pointer, E4108 where there are only pickles.
        """
        tensors: dict[str, StoredTensor] = {}
        paths = _weight_files(folder)
        for path in paths:
            for stored, entry in safetensors_header(path).items():
                name = _renamed(stored, renames)
                if name in tensors:
                    raise FormatError(
                        "E4106",
                        f"The tensor {name} is stored in {tensors[name].path.name} and {path.name}.",
                        why="two shards of one checkpoint never hold the same tensor",
                        fix="download the folder again",
                    )
                tensors[name] = StoredTensor(path=path, entry=entry)
        stamps = {path: _stamp(path) for path in paths}
        return cls(folder=folder, tensors=dict(sorted(tensors.items())), stamps=stamps)

    @property
    def names(self) -> tuple[str, ...]:
        """Module paths of all tensors, sorted."""
        return tuple(self.tensors)

    def entry(self, name: str) -> TensorEntry:
        """Dtype and shape of a tensor."""
        return self.tensors[name].entry

    def under(self, prefix: str) -> tuple[str, ...]:
        """Module paths that start with ``prefix.``, sorted."""
        return tuple(name for name in self.tensors if name.startswith(prefix + "."))

    def read(self, name: str, *, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """Read one tensor into memory of its own.

        Args:
            name: Module path.
            dtype: Cast to this; None keeps the stored one.

        Raises:
            FormatError: E4102 for a dtype that weights do not have, E4104 if the file changed since it was
                checked.
        """
        import torch

        stored = self.tensors[name]
        if stored.entry.dtype not in FLOATS:
            raise FormatError(
                "E4102",
                f"{name} has dtype {stored.entry.dtype}.",
                why=f"weights are {', '.join(FLOATS)}",
                fix="use the checkpoint in 16 or 32 bits as it was published",
            )
        self._check_unchanged(stored.path)
        found = getattr(torch, FLOATS[stored.entry.dtype])
        size = stored.entry.end - stored.entry.start
        if size == 0:
            return torch.empty(stored.entry.shape, dtype=dtype or found)
        buffer = bytearray(size)
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.entry.start)
            _fill(file.fileno(), buffer)
        tensor = torch.frombuffer(buffer, dtype=found).reshape(stored.entry.shape)
        return tensor if dtype is None else tensor.to(dtype)

    def check_unchanged(self) -> None:
        """Make sure that no file changed since it was checked.

        Raises:
            FormatError: E4104.
        """
        for path in self.stamps:
            self._check_unchanged(path)

    def _check_unchanged(self, path: Path) -> None:
        if _stamp(path) != self.stamps[path]:
            raise FormatError(
                "E4104",
                f"{path.name} changed while it was in use.",
                why="its size or time is not the one found when it was checked",
                fix="run the command again once the folder is at rest",
            )

    def sha256(self) -> str:
        """Hash of names and contents of all weight files, for fingerprints; reads every byte."""
        digest = hashlib.sha256()
        for path in sorted(self.stamps):
            digest.update(f"{path.name} {sha256_of(path)}\n".encode())
        return digest.hexdigest()


def compare(
    weights: SourceWeights,
    expected: Mapping[str, tuple[int, ...]],
    *,
    harmless: Sequence[str] = (),
) -> tuple[str, ...]:
    """Compare a checkpoint with what the config says it holds.

    Args:
        weights: What is there.
        expected: Shapes by module path.
        harmless: Regular expressions of extra tensors that say nothing about the model.

    Returns:
        Names of extra tensors that are harmless.

    Raises:
        FormatError: E4103 for missing or extra tensors, E4102 for a wrong shape or dtype.
    """
    missing = sorted(set(expected) - set(weights.tensors))
    extra = sorted(set(weights.tensors) - set(expected))
    known = [name for name in extra if any(re.search(pattern, name) for pattern in harmless)]
    unknown = sorted(set(extra) - set(known))
    if missing:
        raise FormatError(
            "E4103",
            f"{len(missing)} tensors are missing from the checkpoint: {shortened(missing)}.",
            why=f"config.json describes a model of {len(expected)} tensors",
            fix=("download the folder again", "check that config.json belongs to these weights"),
        )
    if unknown:
        raise FormatError(
            "E4103",
            f"{len(unknown)} tensors belong to no part of the model: {shortened(unknown)}.",
            why="a tensor that is ignored would change the model silently",
            fix="--ignore-extra PATTERN leaves out tensors whose name matches",
        )
    for name, shape in expected.items():
        entry = weights.entry(name)
        if entry.shape != shape or entry.dtype not in FLOATS:
            raise FormatError(
                "E4102",
                f"{name} is {entry.dtype} {entry.shape}.",
                why=f"config.json expects {shape}, in {', '.join(FLOATS)}",
                fix="check that config.json belongs to these weights",
            )
    return tuple(known)


def shortened(names: Sequence[str]) -> str:
    """Say many tensor names in one line: numbers are joined to ranges, then at most six are shown.

    ``a.24.w a.25.w a.26.w`` becomes ``a.24-26.w``.
    """
    groups: dict[str, list[int]] = {}
    for name in names:
        found = re.search(r"\.(\d+)\.", name)
        pattern = name if found is None else f"{name[: found.start(1)]}{{}}{name[found.end(1) :]}"
        groups.setdefault(pattern, []).append(int(found.group(1)) if found else 0)
    shown = [
        pattern.replace("{}", _range(sorted(numbers)))
        for pattern, numbers in sorted(groups.items())
    ]
    more = f" and {len(shown) - 6} more kinds" if len(shown) > 6 else ""
    return ", ".join(shown[:6]) + more


def _range(numbers: list[int]) -> str:
    if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))


def _weight_files(folder: Path) -> list[Path]:
    """List the weight files: those of the index, or the single one."""
    if (folder / INDEX).exists():
        index = read_json(
            contained(folder, INDEX, code="E4105"), limit=INDEX_LIMIT, code="E4105"
        ).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(v, str) for v in index.values()):
            raise FormatError(
                "E4105",
                f"{INDEX} has no weight_map from tensor names to file names.",
                why="the index says which shard holds which tensor",
                fix="download the folder again",
            )
        paths = {
            name: contained(folder, name, code="E4105") for name in sorted(set(index.values()))
        }
        _check_index(index, paths)
        return list(paths.values())
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        return [contained(folder, SINGLE, code="E4105", missing="E4106")]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise FormatError(
            "E4108",
            f"The folder has only pickled weights: {', '.join(pickles[:3])}.",
            why="loading a pickle can run any program hidden in it, so it is never done",
            fix=(
                CONVERT,
                "hf download ORG/NAME --include '*.safetensors'",
            ),
        )
    raise FormatError(
        "E4105",
        f"There are no weights in {folder.name}/.",
        why=f"searched: {SINGLE}, {INDEX}",
        fix="download the folder again",
    )


def _check_index(index: Mapping[str, str], paths: Mapping[str, Path]) -> None:
    """Every tensor lies in the shard that the index names."""
    held = {shard: set(safetensors_header(path)) for shard, path in paths.items()}
    astray = sorted(name for name, shard in index.items() if name not in held[shard])
    if astray:
        raise FormatError(
            "E4103",
            f"{len(astray)} tensors are not in the shard that {INDEX} names: {shortened(astray)}.",
            why="index and shards belong together",
            fix="download the folder again",
        )


def _renamed(name: str, renames: Renames) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def _stamp(path: Path) -> tuple[int, int]:
    regular_size(path, code="E4104")
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _fill(descriptor: int, buffer: bytearray) -> None:
    """Read until the buffer is full; the system returns at most 2 GiB at once."""
    view = memoryview(buffer)
    while view:
        count = os.readv(descriptor, [view[: 1 << 30]])
        if count == 0:
            raise FormatError(
                "E4104", "A weight file became shorter while it was read.", fix="run it again"
            )
        view = view[count:]
