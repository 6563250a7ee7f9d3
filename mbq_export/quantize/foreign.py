"""A checkpoint that another project quantized: which format it has, and what its files hold.

    config.json ── quantization_config ──► format, Recipe ──► scheme, group size of ours
    files ──► decoder linears: codes ──► `linear`     carried over exactly, nothing is dequantized
        └───► everything else: numbers ──► `load`     embedding, norms, tower, head

Which tensors the files hold decides: a decoder linear is codes, everything else is not, and any other
division is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from mbq_export.errors import FormatError, located
from mbq_export.families.base import linear_shapes
from mbq_export.families.weights import SourceWeights, StoredTensor, shortened
from mbq_export.quantize.formats import FORMATS
from mbq_export.quantize.formats.base import (
    BIAS,
    ScaleCounts,
    StoredLinear,
    carried_over,
    fitting_group,
    refused,
    scheme_of,
)
from mbq_export.reading import TensorEntry
from mbq_export.schemes.base import check_packed
from mbq_export.schemes.oracle import dequantized
from mbq_export.tensor_file import DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from mbq_export.families.base import Config, LoadedModel, ModelFamily
    from mbq_export.quantize.formats.base import ForeignFormat, Recipe
    from mbq_export.schemes.base import PackedWeight, QuantScheme

SETTINGS: Final = "quantization_config"


def settings_of(config: Config) -> Mapping[str, Any] | None:
    """What a model's config.json says about quantization, None if nothing that one of our formats reads."""
    text = config.get("text_config")
    found = config.get(SETTINGS) or (text.get(SETTINGS) if isinstance(text, dict) else None)
    known = isinstance(found, dict) and found.get("quant_method") in FORMATS.names()
    return found if known else None


@dataclass(frozen=True, kw_only=True)
class ForeignCheckpoint:
    """A folder of codes in a format of others, its headers checked.

    Attributes:
        folder: Where it lies.
        family: What kind of model it is.
        format: What wrote it.
        recipe: How its linears are stored.
        scheme: The number format of ours that holds them.
        group_size: Columns that share a scale in ours: a part of the file's groups, usually the whole.
        shapes: N and K of the quantized linears by module path, in model order.
        stored: Every tensor of the files by module path.
    """

    folder: Path
    family: ModelFamily
    format: ForeignFormat
    recipe: Recipe
    scheme: QuantScheme
    group_size: int
    shapes: Mapping[str, tuple[int, int]]
    stored: SourceWeights

    @classmethod
    def open(cls, folder: Path, *, config: Config, family: ModelFamily) -> ForeignCheckpoint:
        """Check what the folder holds, by headers alone.

        Args:
            folder: As its writer made it.
            config: Its config.json, for which `settings_of` found something.
            family: What kind of model it is.

        Raises:
            FormatError: E4011 for a kind that cannot be carried over, E4103 if other linears are quantized than
                those of the decoder, E41xx for damaged files.
        """
        settings = settings_of(config)
        assert settings is not None  # the caller's condition
        form = FORMATS[settings["quant_method"]]
        with located(SETTINGS):
            recipe = form.recipe(settings)
            scheme = scheme_of(recipe)
        one_block = linear_shapes(family.text_shape(config))
        layers = range(family.text_shape(config).layers)
        shapes = {
            family.linear_path(block, linear): one_block[linear]
            for block in layers
            for linear in family.linears
        }
        group_size = fitting_group(
            scheme, recipe.group_size, tuple({k for _, k in shapes.values()})
        )
        for _, k in shapes.values():
            scheme.check_columns(k, group_size)
        stored = SourceWeights.open(folder, renames=family.renames)
        _check_division(stored, form, shapes)
        return cls(
            folder=folder,
            family=family,
            format=form,
            recipe=recipe,
            scheme=scheme,
            group_size=group_size,
            shapes=shapes,
            stored=stored,
        )

    @property
    def described(self) -> SourceWeights:
        """The files as those of a model with weights: what families check, and load from."""
        rest = {
            name: tensor
            for name, tensor in self.stored.tensors.items()
            if not (self._owner(name) in self.shapes and not name.endswith(f".{BIAS}"))
        }
        some = next(iter(self.stored.tensors.values()))
        codes = {
            f"{name}.weight": StoredTensor(
                path=some.path, entry=TensorEntry(dtype="F16", shape=shape, start=0, end=0)
            )
            for name, shape in self.shapes.items()
        }
        return _Described(
            folder=self.folder, tensors=rest | codes, stamps=self.stored.stamps, source=self
        )

    def load(self, *, ignore_extra: Sequence[str] = ()) -> LoadedModel:
        """Check every file and load all but the decoder blocks.

        Raises:
            FormatError: As `families.base.Load`.
        """
        model = self.family.load(
            self.folder, meta_blocks=True, ignore_extra=ignore_extra, weights=self.described
        )
        return replace(model, config=_without_settings(model.config))

    def linear(self, name: str) -> tuple[PackedWeight, ScaleCounts]:
        """One linear in our types, its values checked; bias not included.

        Raises:
            FormatError: E4011, E4102, E4103, E4112 or E4411, naming the linear.
        """
        n, k = self.shapes[name]
        parts = {
            path.rpartition(".")[2]: self.array(path)
            for path in self.stored.under(name)
            if path.rpartition(".")[0] == name
        }
        with located(name):
            carried = self.format.read(StoredLinear(n=n, k=k, tensors=parts), self.recipe)
            weight, counts = carried_over(
                carried, k=k, recipe=self.recipe, scheme=self.scheme, group_size=self.group_size
            )
            check_packed(weight)
        return weight, counts

    def array(self, name: str) -> NDArray[Any]:
        """One tensor as stored, read-only; pages come in when they are touched.

        Raises:
            FormatError: E4102 for a dtype that is not read.
        """
        stored = self.stored.tensors[name]
        entry = stored.entry
        if entry.dtype not in DTYPES:
            raise FormatError(
                "E4102",
                f"Tensor {name!r} has dtype {entry.dtype}.",
                why=f"known: {', '.join(DTYPES)}",
                fix="give the 16-bit model it was made from",
            )
        data = np.asarray(np.memmap(stored.path, np.uint8, "r"))[entry.start : entry.end]
        return data.view(DTYPES[entry.dtype]).reshape(entry.shape)

    @staticmethod
    def _owner(name: str) -> str:
        return name.rpartition(".")[0]


@dataclass(frozen=True, kw_only=True)
class _Described(SourceWeights):
    """Looks like the files of a model; a weight that is codes comes as what they stand for."""

    source: ForeignCheckpoint

    def read(self, name: str, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read a tensor; codes are dequantized to float32, for looking at what the model computes.

        Raises:
            FormatError: As `SourceWeights.read` and `ForeignCheckpoint.linear`.
        """
        linear = name.removesuffix(".weight")
        if linear not in self.source.shapes or linear == name:
            return super().read(name, dtype=dtype)
        weight, _ = self.source.linear(linear)
        tensor = torch.from_numpy(dequantized(weight).astype(np.float32))
        return tensor if dtype is None else tensor.to(dtype)


def _check_division(
    stored: SourceWeights, form: ForeignFormat, shapes: Mapping[str, tuple[int, int]]
) -> None:
    """Exactly the decoder's linears are codes."""
    found = {
        name.rpartition(".")[0] for name in stored.tensors if name.rpartition(".")[2] in form.marks
    }
    if not found:
        raise refused(
            f"The files hold no tensor named {form.marks[0]}.", f"{form.name} stores codes as that"
        )
    missing, surplus = sorted(set(shapes) - found), sorted(found - set(shapes))
    if missing or surplus:
        sides = [
            f"{len(names)} {what}: {shortened(names)}"
            for what, names in (("are missing", missing), ("are of no decoder linear", surplus))
            if names
        ]
        raise FormatError(
            "E4103",
            f"Codes of other linears than those of the decoder; {'; '.join(sides)}.",
            why="exactly the decoder's linears are carried over, each under its own name: fused projections, "
            "heads, towers and linears left in 16 bits are not",
            fix="give the 16-bit model it was made from",
        )


def _without_settings(config: Config) -> Config:
    """The config of the model itself."""
    bare = {key: value for key, value in config.items() if key != SETTINGS}
    text = bare.get("text_config")
    if isinstance(text, dict):
        bare["text_config"] = {key: value for key, value in text.items() if key != SETTINGS}
    return bare
