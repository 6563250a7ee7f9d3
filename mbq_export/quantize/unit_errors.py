"""What rounding a unit to a width is predicted to cost the answer, from one pass in full precision.

    E = Q_b(W) - W                                                channel scales folded; clipped if the switches say so
    error_b(u) = sum over linears j and classes C of A2_jC * tr(E H_jC E') / T

tr(E H E') is the sum of squared output errors over the tokens of a class; A2 is the mean square of the gradient that the
answer's loss has there. T is the number of tokens, alike for all units. METHODS 11 has the clipped ratios of mean
absolute gradients in place of A2_jC / A2_jA (docs/decisions/0022).
Rounding is to the nearest codes: error feedback lowers both widths' errors later, and is not run for a prediction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from mbq_export.blocks.fold import fold
from mbq_export.blocks.gram import Gram
from mbq_export.blocks.ratios import squared_weights, weighings
from mbq_export.blocks.reading import rows_read_by
from mbq_export.blocks.tokens import count_classes
from mbq_export.channel_scales import FOR_WIDTHS
from mbq_export.errors import UsageError, located
from mbq_export.progress import Progress, silent
from mbq_export.quantize.apply import nearest_codes, stored_dtype
from mbq_export.quantize.clip import SKIPPED, ClippedGrids, round_clipped
from mbq_export.quantize.clip_pass import weighing
from mbq_export.quantize.gptq import check_hessian, weighted_square
from mbq_export.quantize.streams import Streams
from mbq_export.schemes.affine import dequantize

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from mbq_export.blocks.stream import BlockStream
    from mbq_export.channel_scales import ChannelScales
    from mbq_export.families.base import LoadedModel, Smooth
    from mbq_export.families.inputs import ModelInputs
    from mbq_export.quantize.apply import Rounding
    from mbq_export.quantize.widths import Unit
    from mbq_export.schemes.affine import Codes
    from mbq_export.schemes.base import QuantScheme
    from mbq_export.state import State

STAGE: Final = "widths"
DIGITS: Final = 9
"""As many as are stored, so that a resumed run decides by the same numbers."""

Errors = dict[int, float]
"""Predicted error by bits."""


def gradients_of(scales: ChannelScales) -> Mapping[str, Any]:
    """The gradient report that a calibration kept, for its method or for this.

    Raises:
        UsageError: E2002 if none was measured.
    """
    found: Mapping[str, Any] = scales.sensitivity
    if not found.get("layers"):
        found = found.get(FOR_WIDTHS, {})
    if not found.get("layers"):
        raise UsageError(
            "E2002",
            "Widths are chosen by gradients, and none were measured.",
            why=f"the scales come from --method {scales.switches.method} without --avg-bits or --bytes-budget",
            fix=("calibrate again with --avg-bits", "--bits PATTERN=4 chooses by name"),
        )
    return found


class UnitErrors:
    """Predicts the errors of all units, block after block."""

    def __init__(
        self,
        model: LoadedModel,
        stream: BlockStream,
        scales: ChannelScales,
        rounding: Rounding,
        schemes: Sequence[QuantScheme],
    ) -> None:
        """Keep what decides the errors.

        Args:
            model: Names the linears.
            stream: Gives blocks.
            scales: Folded before rounding; hold the gradients.
            rounding: Groups, and whose rule.
            schemes: Number formats to try, of different widths.

        Raises:
            UsageError: E2002 without gradients.
        """
        self._model, self._stream, self._scales = model, stream, scales
        self._rounding, self._schemes = rounding, schemes
        self._report = gradients_of(scales)
        self._clips = scales.switches.clip != "none"

    def of_all(
        self,
        inputs: Sequence[ModelInputs],
        *,
        state: State | None = None,
        progress: Progress = silent,
    ) -> dict[Unit, Errors]:
        """Predict the errors of every unit.

        Args:
            inputs: Encoded calibration samples.
            state: Keeps the errors of finished blocks.
            progress: Called after each block, of as many again that are rounded later.

        Raises:
            GateError: E1103 naming a unit whose inputs are not finite.
        """
        depth = len(self._stream)
        kept = [state.load_block(STAGE, index) if state else None for index in range(depth)]
        last = max((index for index in range(depth) if kept[index] is None), default=-1)
        tokens = sum(count_classes(inputs).values())
        seen = Streams.begin(self._stream, inputs if last >= 0 else (), exact=True, moved=False)
        found: dict[Unit, Errors] = {}
        for index, saved in enumerate(kept):
            errors: dict[str, Errors] = {}
            if saved is not None:
                errors = {name: _by_bits(row) for name, row in saved.record["errors"].items()}
            if index <= last:
                with self._stream.block(index) as block:
                    self._fold(block.float(), index)
                    if saved is None:
                        errors = self._of_block(block, index, seen, tokens)
                        if state:
                            record = {name: _by_name(row) for name, row in errors.items()}
                            state.save_block(STAGE, index, {}, {"errors": record})
                    seen.advance(self._stream, index, folded=block, rounded=block)
            found |= {(index, name): row for name, row in errors.items()}
            progress(index + 1, 2 * depth, "predicting what rounding costs")
        return found

    def _fold(self, block: nn.Module, index: int) -> None:
        family = self._model.family
        with located(f"{family.blocks}.{index}"):
            fold(block, self._scales.of_block(index), smooth=family.smooth, text=self._model.text)

    def _of_block(
        self, block: nn.Module, index: int, seen: Streams, tokens: int
    ) -> dict[str, Errors]:
        family = self._model.family
        found: dict[str, Errors] = {}
        for place in family.smooth:
            with located(f"{family.blocks}.{index}"), located(place.unit):
                errors = self._of_unit(block, index, place, seen)
            found[place.unit] = {bits: _short(error / tokens) for bits, error in errors.items()}
        return found

    def _of_unit(self, block: nn.Module, index: int, place: Smooth, seen: Streams) -> Errors:
        """Sum of A2 * tr(E H E') over the linears of a unit, by bits."""
        gram, clipped_by = self._gram(block, index, place, seen)
        errors = dict.fromkeys((scheme.weight_bits for scheme in self._schemes), 0.0)
        for linear in place.into:
            hessian = gram.hessian(linear)
            check_hessian(hessian)
            measured = self._report["layers"][index]["linears"][linear]["mean_sq"]["answer"]
            weight = block.get_parameter(f"{linear}.weight").detach()
            stored = stored_dtype(self._model, self._model.family.linear_path(index, linear))
            for scheme in self._schemes:
                if linear in clipped_by:
                    codes = self._clipped(weight, gram, clipped_by[linear], scheme)
                else:
                    codes = nearest_codes(weight, self._rounding, scheme=scheme, stored=stored)
                change = (dequantize(codes) - weight).double()
                error = float(measured or 0.0) * weighted_square(change, hessian.double())
                errors[scheme.weight_bits] += error
        return errors

    def _clipped(self, weight: Tensor, gram: Gram, name: str, scheme: QuantScheme) -> Codes:
        size = self._rounding.group_size
        columns = gram.columns // scheme.groups_of(gram.columns, size)
        grids = ClippedGrids(gram.diagonal_blocks(name, columns), scheme=scheme, channel=False)
        return round_clipped(weight, grids, scheme=scheme, group_size=size)

    def _gram(
        self, block: nn.Module, index: int, place: Smooth, seen: Streams
    ) -> tuple[Gram, dict[str, str]]:
        """Gram matrices of a unit's inputs: by linear for errors, and which of them clipping weighs a linear by."""
        weights = {linear: squared_weights(self._report, index, linear) for linear in place.into}
        clipped_by: dict[str, str] = {}
        if self._clips:
            report, clipped = self._scales.sensitivity, [n for n in place.into if n not in SKIPPED]
            alike = weighing(report, self._schemes[0]) == "plain"
            names, ratios = weighings(report, index, clipped, alike=alike)
            clipped_by = {linear: f"clip by {name}" for linear, name in names.items()}
            weights |= {f"clip by {name}": each for name, each in ratios.items()}
        gram = Gram(int(block.get_parameter(f"{place.into[0]}.weight").shape[1]), weights)
        read = rows_read_by(
            place.into[0], stream=self._stream, block=block, index=index, batches=seen.before
        )
        for batch, rows in zip(seen.batches, read, strict=True):
            gram.add(rows, batch.classes)
        return gram, clipped_by


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _by_name(errors: Errors) -> dict[str, float]:
    return {str(bits): error for bits, error in errors.items()}


def _by_bits(errors: Mapping[str, float]) -> Errors:
    return {int(bits): error for bits, error in errors.items()}
