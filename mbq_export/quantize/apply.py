"""One decoder block from weights to what a checkpoint stores: fold, round, pack.

block in float32 ── fold e ──► W diag(e), norm / e ── round ──► codes, s, z ── pack ──► words
                               biases, norms, kept linears ── stored exactly ──────────► tensors
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from mbq_export.blocks.fold import fold
from mbq_export.errors import FormatError, located
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.affine import Codes, dequantize
from mbq_export.schemes.affine import quantize as round_to_codes
from mbq_export.schemes.base import CHANNEL
from mbq_export.schemes.layouts.dense import pack, unpack
from mbq_export.tensor_file import BFLOAT16, DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import nn

    from mbq_export.blocks.stream import BlockStream
    from mbq_export.channel_scales import ChannelScales
    from mbq_export.families.base import LoadedModel
    from mbq_export.schemes.base import QuantScheme

logger = logging.getLogger(__name__)

CLAMPED_SHARE_NOTED: Final = 1e-3
ERROR_DIGITS: Final = 6
_TORCH_DTYPES: Final = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """How linears become codes.

    Attributes:
        scheme: Number format; None keeps them as they are.
        group_size: Columns that share a scale, or `CHANNEL`.
        compat: Use the published rule, in the dtype that the weight has in the model's files; symmetric schemes
            have the one rule.
        units: Number formats of single units by layer and name, in place of `scheme`; activations and groups are alike
            in all of them.
    """

    scheme: QuantScheme | None
    group_size: int
    compat: bool = False
    units: Mapping[tuple[int, str], QuantScheme] = field(default_factory=dict)

    def of(self, layer: int, unit: str) -> QuantScheme:
        """Number format of the linears of a unit, where there is something to round."""
        found = self.units.get((layer, unit), self.scheme)
        assert found is not None  # the caller's condition
        return found


@dataclass(frozen=True, kw_only=True)
class RoundedLinears:
    """Linears of a block, rounded for what they read.

    Attributes:
        codes: By linear, relative to the block.
        facts: By linear, what `mbq.json` says beside the row of every method.
    """

    codes: dict[str, Codes] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)


class Rounder(Protocol):
    """Rounds blocks in their order by what they read: `Feedback`, `ClipPass`, `BlockSearch`."""

    def round(self, block: nn.Module, index: int) -> RoundedLinears:
        """Round the block after the one that was passed last."""
        ...

    def go_on(self, block: nn.Module, index: int, codes: Mapping[str, Codes]) -> None:
        """Pass a block that is finished."""
        ...


@dataclass(frozen=True, kw_only=True)
class QuantizedBlock:
    """What a checkpoint stores of one block.

    Attributes:
        tensors: By full name.
        linears: One row for `mbq.json` per quantized linear, in model order.
        sha256: Hash of the block's weights as they were before folding.
    """

    tensors: Mapping[str, NDArray[Any]]
    linears: tuple[Mapping[str, Any], ...]
    sha256: str

    @property
    def error(self) -> float:
        """Largest relative error of a linear, 0 without any."""
        return max((row["error"]["weight"] for row in self.linears), default=0.0)


def quantize_block(  # noqa: PLR0913 - a block, all that decides it, and who reads on
    model: LoadedModel,
    stream: BlockStream,
    index: int,
    scales: ChannelScales,
    rounding: Rounding,
    *,
    rounder: Rounder | None = None,
    onwards: bool = False,
) -> QuantizedBlock:
    """Fold a block's channel scales and round its linears, in float32 whatever the model's dtype.

    Args:
        model: Names the linears.
        stream: Gives the block.
        index: Its position.
        scales: Folded before rounding.
        rounding: Number format.
        rounder: Rounds for what linears read, not each weight by itself; must have passed the blocks before.
        onwards: Let the rows of the rounder pass this block, because somebody reads them behind it.

    Raises:
        FormatError: E4110 or E4112 naming the tensor, E4314 for a scale that does not fit.
        GateError: E1103 or E1110 from the rounder.
    """
    family = model.family
    path = f"{family.blocks}.{index}"
    tensors: dict[str, NDArray[Any]] = {}
    rows: list[dict[str, Any]] = []
    with stream.block(index) as block:
        block.float()
        before = {f"{path}.{name}": tensor for name, tensor in block.state_dict().items()}
        check_finite(before)
        digest = content_hash(before)
        _fold(model, block, index, scales)
        folded = {f"{path}.{name}": tensor for name, tensor in block.state_dict().items()}
        found = None if rounder is None else rounder.round(block, index)
        if rounding.scheme is not None:
            for linear in family.linears:
                name = f"{path}.{linear}"
                scheme = rounding.of(index, _unit(model, linear))
                weight = folded.pop(f"{name}.weight")
                with located(name):
                    if found is None:
                        stored = stored_dtype(model, name)
                        codes = nearest_codes(weight, rounding, scheme=scheme, stored=stored)
                    else:
                        codes = found.codes[linear]
                    rows.append(
                        {
                            "name": name,
                            "n": weight.shape[0],
                            "k": weight.shape[1],
                            "scheme": scheme.name,
                            "group_size": rounding.group_size,
                            "bias": f"{name}.bias" in folded,
                            "alpha": _alpha(model, scales, index, linear),
                            "error": {"weight": relative_error(codes, weight)},
                            "clamped_scales": codes.clamped,
                            **({} if found is None else found.facts[linear]),
                        }
                    )
                    note_zeros(name, weight, codes)
                tensors |= packed_tensors(name, codes, scheme)
        tensors |= {name: exact(tensor, model, name) for name, tensor in folded.items()}
        if rounder is not None and found is not None and onwards:
            rounder.go_on(block, index, found.codes)
    return QuantizedBlock(tensors=tensors, linears=tuple(rows), sha256=digest)


def pass_block(
    model: LoadedModel,
    stream: BlockStream,
    index: int,
    scales: ChannelScales,
    kept: QuantizedBlock,
    *,
    rounder: Rounder,
) -> None:
    """Let the rows of a rounder pass a block that an earlier run finished.

    The result is that of passing it when it was rounded: codes and scales are stored as they were computed with.
    """
    path = f"{model.family.blocks}.{index}"
    with stream.block(index) as block:
        _fold(model, block.float(), index, scales)
        codes = {
            row["name"].removeprefix(f"{path}."): _unpacked(kept.tensors, row)
            for row in kept.linears
        }
        rounder.go_on(block, index, codes)


def _fold(model: LoadedModel, block: nn.Module, index: int, scales: ChannelScales) -> None:
    family = model.family
    with located(f"{family.blocks}.{index}"):
        fold(block, scales.of_block(index), smooth=family.smooth, text=model.text)


def exact(tensor: Tensor, model: LoadedModel, name: str) -> NDArray[Any]:
    """A tensor as it is stored: in the dtype of the model's files if that holds its value, else float32.

    Args:
        tensor: Any shape, any floating dtype.
        model: Its files know the dtype.
        name: Module path of the tensor.
    """
    values: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    dtype = DTYPES[model.weights.entry(name).dtype] if name in model.weights.tensors else None
    if dtype in {DTYPES["F16"], BFLOAT16}:
        with np.errstate(over="ignore"):
            narrow = values.astype(dtype)
        if np.array_equal(narrow.astype(np.float32), values):
            return narrow
    return values


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that are NaN or infinite.

    Raises:
        FormatError: E4110, naming the tensor, how many values are bad, and the first of them.
    """
    for name, tensor in tensors.items():
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            first = bad.nonzero()[0].tolist()
            raise FormatError(
                "E4110",
                f"{int(bad.sum())} of {tensor.numel()} values of {name} are not finite.",
                why=f"the first is at {first}; a NaN or infinite weight has no code",
                fix="check the checkpoint: mbq-export inspect MODEL",
            )


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and float32 values: equal for equal weights, however they are stored."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensors[name].detach().float().cpu().numpy()).data)
    return digest.hexdigest()


def relative_error(codes: Codes, weight: Tensor) -> float:
    """Frobenius norm of rounding's change over that of the folded weight, six digits.

    Folded, a column weighs by its channel scale, as it does in what the linear computes. Summed by numpy
    in one thread, so that the number of threads does not show in the last digits.
    """
    change = (dequantize(codes) - weight.float()).numpy().astype(np.float64)
    size = float(np.square(weight.float().numpy().astype(np.float64)).sum())
    ratio = float(np.sqrt(np.square(change).sum() / size)) if size else 0.0
    return float(f"{ratio:.{ERROR_DIGITS}g}")


def note_zeros(name: str, weight: Tensor, codes: Codes) -> None:
    """Warn of weights that are zero where they should not be (W4111)."""
    found = {
        "input channels are dead": int((weight == 0).all(0).sum()),
        "rows are constant": int((weight.amax(1) == weight.amin(1)).sum()),
        "groups are smaller than a scale can be": (
            codes.clamped if codes.clamped > CLAMPED_SHARE_NOTED * codes.scales.numel() else 0
        ),
    }
    if bool((weight == 0).all()):
        logger.warning("MBQ-W4111: all weights of %s are zero", name)
    elif any(found.values()):
        counts = ", ".join(f"{count} {what}" for what, count in found.items() if count)
        logger.warning("MBQ-W4111: %s: %s", name, counts)


def nearest_codes(
    weight: Tensor, rounding: Rounding, *, scheme: QuantScheme, stored: torch.dtype
) -> Codes:
    """Round a weight by itself, scales as they are stored.

    Args:
        weight: (N, K), finite.
        rounding: Groups, and whose rule.
        scheme: Number format of its unit.
        stored: Dtype that the weight has in the model's files.

    Raises:
        FormatError: E4112 for a range that fp16 cannot hold.
    """
    codes = round_to_codes(
        weight.to(stored) if rounding.compat and not scheme.symmetric else weight,
        scheme=scheme,
        group_size=rounding.group_size,
        compat=rounding.compat,
    )
    if rounding.group_size == CHANNEL:
        return codes
    scales = codes.scales.to(torch.float16)
    changed = int((scales.float() != codes.scales.float()).sum())
    if changed:
        logger.info("%d of %d scales were rounded to fp16", changed, scales.numel())
    return Codes(codes=codes.codes, scales=scales, zeros=codes.zeros, clamped=codes.clamped)


def packed_tensors(name: str, codes: Codes, scheme: QuantScheme) -> dict[str, NDArray[Any]]:
    """What a checkpoint stores of a linear's weight, by full name."""
    words = pack(codes.codes.numpy(), bits=scheme.weight_bits)
    zeros = {} if scheme.symmetric else {f"{name}.zeros": codes.zeros.numpy()}
    return {
        f"{name}.qweight": words.view(np.int32),
        f"{name}.scales": codes.scales.numpy(),
        **zeros,
    }


def _unpacked(tensors: Mapping[str, NDArray[Any]], row: Mapping[str, Any]) -> Codes:
    """Undo `packed_tensors`."""
    name, scheme = row["name"], SCHEMES[row["scheme"]]
    scales = torch.from_numpy(np.array(tensors[f"{name}.scales"]))
    words = np.array(tensors[f"{name}.qweight"]).view(np.uint32)
    return Codes(
        codes=torch.from_numpy(unpack(words, bits=scheme.weight_bits, columns=row["k"])),
        scales=scales,
        zeros=torch.full_like(scales, scheme.middle).to(torch.uint8)
        if scheme.symmetric
        else torch.from_numpy(np.array(tensors[f"{name}.zeros"])),
        clamped=row["clamped_scales"],
    )


def stored_dtype(model: LoadedModel, linear: str) -> torch.dtype:
    """Dtype that the weight of a linear has in the model's files."""
    return _TORCH_DTYPES[model.weights.entry(f"{linear}.weight").dtype]


def _alpha(model: LoadedModel, scales: ChannelScales, index: int, linear: str) -> float | None:
    """The exponent that the search chose for the unit of a linear, None if it was left as it is."""
    unit = _unit(model, linear)
    for row in scales.calib.get("units", ()):
        if row["layer"] == index and row["unit"] == unit:
            alpha: float | None = row["alpha"]
            return alpha
    return None


def _unit(model: LoadedModel, linear: str) -> str:
    return next(place.unit for place in model.family.smooth if linear in place.into)
