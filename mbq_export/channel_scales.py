"""The result of a calibration: one scale per input channel of each unit, and how it was found.

::

    <scales>/calib.json           data facts, resolved switches, a record per searched unit
             sensitivity.json     gradient statistics per linear and token class
             scales.safetensors   layers.<l>.<unit>.e float32 (K,)

Nothing in the three files depends on time, place or machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    Literal,
    NoReturn,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np

from mbq_export.errors import FormatError, IncompatibleError, UsageError, located
from mbq_export.reading import read_json
from mbq_export.tensor_file import TensorFile, write_tensors
from mbq_export.writing import explained, json_bytes, write_file

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

CALIB_FILE: Final = "calib.json"
SENSITIVITY_FILE: Final = "sensitivity.json"
SCALES_FILE: Final = "scales.safetensors"
CALIB_SCHEMA: Final = "mbq-export/calib@1"
SENSITIVITY_SCHEMA: Final = "mbq-export/sensitivity@1"
JSON_LIMIT_BYTES: Final = 64 << 20

FOR_WIDTHS: Final = "for_widths"
"""Where `SENSITIVITY_FILE` keeps gradients that only a choice of widths asked for: nothing else looks at them."""

OF_FEEDBACK: Final = ("hessian", "gptq_prefix", "asym", "damp")
"""Switches that decide nothing, and are not stored, unless ``rounding`` is "gptq"."""
OF_SCOPE: Final = ("search_scope", "qvlm_measure", "search_alpha")
"""Switches that decide nothing, and are not stored, unless ``search_scope`` is "block"."""

_ENTRY: Final = re.compile(r"layers\.(0|[1-9]\d{0,5})\.([a-z_]+)\.e")


@dataclass(frozen=True, slots=True, kw_only=True)
class Switches:
    """The independent choices that a method is a preset of (METHODS 0), resolved.

    Attributes:
        method: Name of the preset, for readers; the other fields decide what is done.
        loss: "mae" or "mse".
        grid: "21" (alpha = k/20, k = 0..20), "20" (without alpha = 1, as published) or "auto" (every other one of the
            21 where plain rounding costs least).
        stat: Channel statistic: a mean, "balanced", "mixed", "answer" or "vision", or the largest, "max".
        rounding: "nearest", or "gptq" for error feedback on the calibration samples.
        clip: "none", or "group" to shrink each group's range as its weighed rounding error asks for.
        gqa_o_scale: Scale the attention output under grouped-query attention too.
        r_floor: Least ratio of a layer: "median" over the layers, "none" or a number.
        prefix: Inputs of the search: "fp", those of the full-precision model, or "quantized", those that rounded blocks
            before leave.
        compat: "none", or "mbq" for the arithmetic of the published code.
        tokens: Tokens per class that score a candidate: a number or "all".
        modality_weight: Replaces every measured r; None keeps the measured ones.
        search_prompt_weight: Weight of prompt tokens in the search: "0" or "measured".
        hessian: What error feedback weighs tokens by: "plain" all alike, "balanced" by each linear's own ratios,
            "auto" what serves held-out samples better.
        gptq_prefix: Inputs of error feedback: "quantized", those that quantized blocks before leave, or "fp".
        asym: How far error feedback moves weights towards the full-precision output, from 0 to 1; "auto" decides
            between the two on held-out samples.
        damp: Share of its mean diagonal that a Hessian is damped with.
        search_scope: "linear", or "block" to choose ranges of weights for several halves of blocks together.
        qvlm_measure: What groups halves: "conditional-entropy" or "mutual-info" of neighbours.
        search_alpha: Move exponents of channel scales by a step of the grid in that search, too.
    """

    method: str
    loss: Literal["mae", "mse"] = "mae"
    grid: Literal["21", "20", "auto"] = "21"
    stat: Literal["balanced", "mixed", "answer", "vision", "max"] = "balanced"
    rounding: Literal["nearest", "gptq"] = "nearest"
    clip: Literal["none", "group"] = "none"
    gqa_o_scale: bool = True
    r_floor: Literal["median", "none"] | float = "median"
    prefix: Literal["fp", "quantized"] = "fp"
    compat: Literal["none", "mbq"] = "none"
    tokens: Literal["all"] | int = 512
    modality_weight: float | None = None
    search_prompt_weight: Literal["0", "measured"] = "0"
    hessian: Literal["auto", "plain", "balanced"] = "auto"
    gptq_prefix: Literal["quantized", "fp"] = "quantized"
    asym: Literal["auto"] | float = "auto"
    damp: float = 0.01
    search_scope: Literal["linear", "block"] = "linear"
    qvlm_measure: Literal["conditional-entropy", "mutual-info"] = "conditional-entropy"
    search_alpha: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no code knows.

        Raises:
            UsageError: E2001.
        """
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, kind) or (name == "asym" and value != "auto" and value > 1):
                raise UsageError(
                    "E2001",
                    f"Switch {name} has the unknown value {value!r}.",
                    why=f"known: {_spelt(kind)}{' to 1' if name == 'asym' else ''}",
                    fix=f"--{name.replace('_', '-')} with a known value",
                )

    @property
    def looks_at_data(self) -> bool:
        """Whether rounding looks at calibration samples."""
        return self.rounding == "gptq" or self.clip != "none" or self.search_scope == "block"

    def resolved(self) -> dict[str, object]:
        """All switches by name, as they are stored; those of error feedback or of a scope only where it is used."""
        return {
            name: getattr(self, name) for name in self._stored(self.rounding, self.search_scope)
        }

    @classmethod
    def _stored(cls, rounding: object, scope: object) -> list[str]:
        idle = {
            *(() if rounding == "gptq" else OF_FEEDBACK),
            *(() if scope == "block" else OF_SCOPE),
        }
        return [field.name for field in fields(cls) if field.name not in idle]

    @classmethod
    def restored(cls, stored: object) -> Switches:
        """Undo `resolved`.

        Raises:
            FormatError: E4314 if a switch is missing, unknown or has an unknown value.
        """
        known = stored if isinstance(stored, Mapping) else {}
        names = set(cls._stored(known.get("rounding"), known.get("search_scope")))
        if not isinstance(stored, Mapping) or set(stored) != names:
            odd = set(stored) ^ names if isinstance(stored, Mapping) else names
            _refuse(f"Switches are missing or unknown: {', '.join(sorted(map(str, odd)))}.")
        try:
            return cls(**stored)
        except UsageError as error:
            raise FormatError(
                "E4314", error.message, why=error.why, fix="calibrate the model again"
            ) from error


@dataclass(frozen=True, kw_only=True)
class ChannelScales:
    """What stage 1 hands to stage 2.

    Attributes:
        scales: ``layers.<l>.<unit>.e`` to (K,) float32: input channels of the unit's linears are multiplied
            by e, the operation before is divided by it. A unit without an entry is left as it is.
        sensitivity: Gradient statistics (METHODS 4.5); may be empty.
        calib: ``switches``, and where a search was made ``data``, ``units`` and more (METHODS 17).
    """

    scales: Mapping[str, NDArray[np.float32]]
    sensitivity: Mapping[str, Any]
    calib: Mapping[str, Any]

    @property
    def switches(self) -> Switches:
        """The resolved switches that `calib` holds.

        Raises:
            FormatError: E4314.
        """
        return Switches.restored(self.calib.get("switches"))

    def of_block(self, index: int) -> dict[str, NDArray[np.float32]]:
        """Scales of one block by unit name, in the order of names as in a file; units left as they are do not occur.

        Folding one unit before another rounds differently: the order must not depend on where scales come from.
        """
        prefix = f"layers.{index}."
        return {
            name.removeprefix(prefix).removesuffix(".e"): scale
            for name, scale in sorted(self.scales.items())
            if name.startswith(prefix)
        }

    @property
    def blocks(self) -> int:
        """One more than the largest block index that has a scale."""
        found = (_ENTRY.fullmatch(name) for name in self.scales)
        return max((int(entry[1]) + 1 for entry in found if entry), default=0)

    def write(self, folder: Path) -> None:
        """Write the three files, each whole or not at all.

        Args:
            folder: Made if missing.

        Raises:
            ResourceError: E5001 or E5008.
        """
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / SCALES_FILE, self.scales)
        sensitivity = {**self.sensitivity, "schema": SENSITIVITY_SCHEMA}
        write_file(folder / SENSITIVITY_FILE, json_bytes(sensitivity))
        write_file(folder / CALIB_FILE, json_bytes({**self.calib, "schema": CALIB_SCHEMA}))

    @classmethod
    def read(cls, folder: Path) -> ChannelScales:
        """Read and check the three files.

        Raises:
            FormatError: E4314 if a file is missing or malformed, a name is no scale's, or a scale is not
                positive and finite; E4101 if the tensors' file is damaged.
            IncompatibleError: E7004 for a newer schema.
        """
        if not (folder / CALIB_FILE).is_file():
            inside = next(folder.glob(f"*/{CALIB_FILE}"), None)
            raise FormatError(
                "E4314",
                f"There is no {CALIB_FILE} in {folder}.",
                why="channel scales are a folder as calibrate writes it",
                fix=f"use {inside.parent}"
                if inside
                else "mbq-export calibrate --model MODEL -o DIR",
            )
        sensitivity = _read(folder / SENSITIVITY_FILE, SENSITIVITY_SCHEMA)
        calib = _read(folder / CALIB_FILE, CALIB_SCHEMA)
        Switches.restored(calib.get("switches"))
        if not (folder / SCALES_FILE).is_file():
            _refuse(f"There is no {SCALES_FILE} in {folder.name}/.")
        file = TensorFile(folder / SCALES_FILE)
        scales = {name: file.array(name) for name in file.entries}
        for name, scale in scales.items():
            with located(name):
                _check_scale(name, scale)
        return cls(scales=scales, sensitivity=sensitivity, calib=calib)


def _read(path: Path, schema: str) -> dict[str, Any]:
    found = read_json(path, limit=JSON_LIMIT_BYTES, code="E4314")
    name, _, major = str(found.get("schema")).partition("@")
    wanted, _, known = schema.partition("@")
    if name != wanted or not major.isdecimal():
        _refuse(f"{path.name} has schema {found.get('schema')!r}, not {schema}.")
    if int(major) > int(known):
        raise IncompatibleError(
            "E7004",
            f"{path.name} has schema {found['schema']!r}.",
            why=f"this release reads up to {schema}",
            fix="use the release of mbq-export that wrote it",
        )
    return found


def _check_scale(name: str, scale: NDArray[Any]) -> None:
    if not _ENTRY.fullmatch(name):
        _refuse(f"{name!r} is no name of a scale.")
    if scale.dtype != np.float32 or scale.ndim != 1:
        _refuse(f"The scale is {scale.dtype} of shape {scale.shape}, not float32 (K,).")
    bad = int((~(np.isfinite(scale) & (scale > 0))).sum())
    if bad:
        _refuse(f"{bad} of {scale.size} scales are not positive and finite.")


def _refuse(message: str) -> NoReturn:
    raise FormatError(
        "E4314",
        message,
        why=f"scales are {CALIB_FILE}, {SENSITIVITY_FILE} and {SCALES_FILE} as calibrate writes them",
        fix="calibrate the model again",
    )


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is one that a type hint of `Switches` allows."""
    if get_origin(kind) in {Union, UnionType}:
        return any(_fits(value, part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind is int and type(value) is int:
        return value >= 1
    if kind is float and type(value) in {int, float}:
        return math.isfinite(value) and value >= 0
    return type(value) is kind


def _spelt(kind: Any) -> str:
    """The values that a type hint allows, for a message."""
    if get_origin(kind) in {Union, UnionType}:
        return ", ".join(_spelt(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    return {
        int: "a whole number from 1",
        float: "a number from 0",
        bool: "on, off",
        str: "text",
    }.get(kind, "none")
