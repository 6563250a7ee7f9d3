"""What calibration hands to quantization, and what quantization hands to export: two folders on disk.

    <scales>/      calib.json  sensitivity.json  scales.safetensors
    <checkpoint>/  mbq.json  model-00001-of-0000n.safetensors  model.safetensors.index.json  config.json
                   tokenizer and processor files

Both are deterministic: sorted keys, no times, no hosts, no absolute paths. Reading needs numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from mbq_export.schemes.base import PackedWeight

CHECKPOINT_FILE: Final = "mbq.json"
KEPT: Final = "none"
"""Name that stands for "no linear is quantized": the full-precision baseline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Switches:
    """The independent choices that a method is a preset of (METHODS 0), resolved.

    Attributes:
        method: Name of the preset, for readers; the other fields decide what is done.
        loss: "mae" or "mse".
        grid: "21" (alpha = k/20, k = 0..20) or "20" (without alpha = 1, as published).
        stat: Channel statistic: "balanced", "mixed", "answer" or "vision".
        rounding: "nearest".
        clip: "none".
        gqa_o_scale: Scale the attention output under grouped-query attention too.
        r_floor: "median", "none" or a number.
        prefix: Inputs of the search: "fp".
        compat: "none" or "mbq", the arithmetic of the published code.
        tokens: Tokens per class that score a candidate: a number or "all".
        modality_weight: Replaces every measured r; None keeps the measured ones.
        search_prompt_weight: "0" or "measured".
    """

    method: str
    loss: Literal["mae", "mse"] = "mae"
    grid: Literal["21", "20"] = "21"
    stat: Literal["balanced", "mixed", "answer", "vision"] = "balanced"
    rounding: Literal["nearest"] = "nearest"
    clip: Literal["none"] = "none"
    gqa_o_scale: bool = True
    r_floor: Literal["median", "none"] | float = "median"
    prefix: Literal["fp"] = "fp"
    compat: Literal["none", "mbq"] = "none"
    tokens: Literal["all"] | int = 512
    modality_weight: float | None = None
    search_prompt_weight: Literal["0", "measured"] = "0"

    def resolved(self) -> dict[str, object]:
        """All switches by name, as they are stored."""
        raise NotImplementedError

    @classmethod
    def restored(cls, stored: Mapping[str, Any]) -> Switches:
        """Undo `resolved`.

        Raises:
            FormatError: E4314 if a switch is missing, unknown or has an illegal value.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ChannelScales:
    """The result of a calibration.

    Attributes:
        scales: ``layers.<l>.<unit>.e`` to (K,) float32: input channels of the unit's linears are multiplied
            by e, the operation before is divided by it. A unit without an entry is left as it is.
        sensitivity: Gradient statistics (METHODS 4.5).
        calib: Data facts, resolved switches, one record per searched unit (METHODS 17).
    """

    scales: Mapping[str, NDArray[np.float32]]
    sensitivity: Mapping[str, Any]
    calib: Mapping[str, Any]

    @property
    def switches(self) -> Switches:
        """The resolved switches that `calib` holds."""
        raise NotImplementedError

    def of_block(self, index: int) -> dict[str, NDArray[np.float32]]:
        """Scales of one block by unit name; units left as they are do not occur."""
        raise NotImplementedError

    def write(self, folder: Path) -> None:
        """Write the three files into an existing or new folder, each whole or not at all.

        Raises:
            ResourceError: E5001 or E5008.
        """
        raise NotImplementedError

    @classmethod
    def read(cls, folder: Path) -> ChannelScales:
        """Read and check the three files.

        Raises:
            FormatError: E4314 if a file is missing or malformed, or a scale is not positive and finite.
            IncompatibleError: E7004 for a newer schema.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class QuantCheckpoint:
    """Codes, scales and zero points of all quantized linears, and the untouched rest of the model.

    Tensors are read from mapped files when asked for; opening a large checkpoint costs no memory.

    Attributes:
        folder: Where it lies.
        info: Parsed `CHECKPOINT_FILE`.
        config: The model's config.json.
    """

    folder: Path
    info: Mapping[str, Any]
    config: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> QuantCheckpoint:
        """Open and check (FORMATS 13.1).

        Args:
            folder: As `quantize` wrote it.
            verify: Also compare every file's hash and check the values of every linear.

        Raises:
            FormatError: E4604, E4605, E4601, E4602, E4101, E4102, E4103 or E4411.
            IncompatibleError: E7004 for a newer schema, E7005 for an unknown layout version.
        """
        raise NotImplementedError

    @property
    def scheme_name(self) -> str:
        """Name of the number format, or `KEPT`."""
        raise NotImplementedError

    @property
    def group_size(self) -> int:
        """Columns that share a scale; 0 when no linear is quantized."""
        raise NotImplementedError

    @property
    def linears(self) -> tuple[str, ...]:
        """Full module paths of the quantized linears, in model order."""
        raise NotImplementedError

    @property
    def tensors(self) -> tuple[str, ...]:
        """Full names of the untouched tensors, sorted; biases of quantized linears are not among them."""
        raise NotImplementedError

    def has(self, name: str) -> bool:
        """Whether `tensor` knows a name, for example ``lm_head.weight``, tied heads included."""
        raise NotImplementedError

    def tensor(self, name: str) -> NDArray[np.floating]:
        """Untouched tensor, or bias of a quantized linear, by its transformers name.

        Returns:
            float16 or float32 as stored (bfloat16 is widened to float32), read-only. A tied head is the
            embedding.

        Raises:
            FormatError: E4103 if there is none of that name.
        """
        raise NotImplementedError

    def packed(self, name: str) -> PackedWeight:
        """One quantized linear by its module path; arrays are read-only views of the mapped file.

        Raises:
            FormatError: E4103 if it is no quantized linear, E4102 or E4411 if its values are bad.
        """
        raise NotImplementedError

    def rows(self, name: str, start: int, stop: int) -> PackedWeight:
        """Rows ``start`` to ``stop`` of a quantized linear, bias included."""
        raise NotImplementedError
