"""Blocks rounded to the nearest codes of clipped groups.

Weights of errors come from what the full-precision model feeds each linear, channel scales folded, as the search of
those scales sees it. Only the parts of the Gram matrices inside groups are kept: K x group size floats per weighing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

from mbq_export.blocks.gram import GroupGram
from mbq_export.blocks.ratios import weighings
from mbq_export.blocks.reading import rows_read_by
from mbq_export.errors import UsageError, located
from mbq_export.quantize.apply import RoundedLinears
from mbq_export.quantize.clip import SKIPPED, ClippedGrids, clip_facts, round_clipped
from mbq_export.quantize.gptq import check_hessian
from mbq_export.quantize.streams import Streams, rows_multiplied
from mbq_export.schemes.affine import quantize
from mbq_export.schemes.base import CHANNEL

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from mbq_export.blocks.stream import BlockStream
    from mbq_export.channel_scales import ChannelScales
    from mbq_export.families.base import LoadedModel, Smooth
    from mbq_export.quantize.apply import Rounding
    from mbq_export.quantize.feedback import Samples
    from mbq_export.schemes.affine import Codes
    from mbq_export.schemes.base import QuantScheme

FEWEST_WEIGHED_BITS: Final = 3
"""With fewer bits token classes weigh alike: errors are too large for ratios of first-order gradients."""


class ClipPass:
    """Rounds the blocks of a model in their order."""

    def __init__(
        self,
        model: LoadedModel,
        stream: BlockStream,
        scales: ChannelScales,
        samples: Samples | None,
        *,
        rounding: Rounding,
    ) -> None:
        """Embed the samples.

        Raises:
            UsageError: E2018 without samples.
        """
        if samples is None or not samples.inputs:
            raise UsageError(
                "E2018",
                "Clipping has no calibration data to look at.",
                why="it weighs rounding errors by what the linears read",
                fix=("--data calib.jsonl", "--clip none"),
            )
        self._model, self._stream = model, stream
        self._rounding = rounding
        self._report = scales.sensitivity
        self._seen = Streams.begin(stream, samples.inputs, exact=True, moved=False)

    def round(self, block: nn.Module, index: int) -> RoundedLinears:
        """Round all linears of a block.

        Args:
            block: With folded scales, in float32; not changed.
            index: Its position; the one after the block that was passed last.

        Raises:
            GateError: E1103, naming the unit and linear.
            FormatError: E4110 or E4112.
        """
        codes: dict[str, Codes] = {}
        facts: dict[str, dict[str, Any]] = {}
        for place in self._model.family.smooth:
            with located(f"{self._model.family.blocks}.{index}"), located(place.unit):
                scheme = self._rounding.of(index, place.unit)
                blocks = self._blocks(block, index, place, scheme)
                for linear in place.into:
                    weight = block.get_parameter(f"{linear}.weight").detach()
                    with located(linear):
                        found = self._rounded(weight, blocks.get(linear), scheme)
                    codes[linear], facts[linear] = found
        return RoundedLinears(codes=codes, facts=facts)

    def go_on(self, block: nn.Module, index: int, codes: Mapping[str, Codes]) -> None:  # noqa: ARG002
        """Let the rows pass a block that is finished, now or by an earlier run.

        Args:
            block: With folded scales, in float32; not changed.
            index: Its position.
            codes: What is stored of it; the rows are those of full precision, and do not depend on it.
        """
        self._seen.advance(self._stream, index, folded=block, rounded=block)

    def _rounded(
        self, weight: Tensor, blocks: Tensor | None, scheme: QuantScheme
    ) -> tuple[Codes, dict[str, Any]]:
        size = self._rounding.group_size
        if blocks is None:
            return quantize(weight, scheme=scheme, group_size=size), {}
        check_hessian(blocks)
        grids = ClippedGrids(blocks, scheme=scheme, channel=size == CHANNEL)
        codes = round_clipped(weight, grids, scheme=scheme, group_size=size)
        return codes, {"clip": clip_facts(grids, weighing(self._report, scheme))}

    def _blocks(
        self, block: nn.Module, index: int, place: Smooth, scheme: QuantScheme
    ) -> dict[str, Tensor]:
        """Gram matrices inside groups, by linear of a unit; none for those that are not clipped."""
        clipped = [linear for linear in place.into if linear not in SKIPPED]
        alike = weighing(self._report, scheme) == "plain"
        names, weights = weighings(self._report, index, clipped, alike=alike)
        columns = int(block.get_parameter(f"{place.into[0]}.weight").shape[1])
        size = columns // scheme.groups_of(columns, self._rounding.group_size)
        gram = GroupGram(columns, weights, group_size=size)
        read = rows_read_by(
            place.into[0],
            stream=self._stream,
            block=block,
            index=index,
            batches=self._seen.before,
        )
        for batch, rows in zip(self._seen.batches, read, strict=True):
            gram.add(rows_multiplied(rows, scheme), batch.classes)
        return {linear: gram.diagonal_blocks(name) for linear, name in names.items()}


def weighing(report: Mapping[str, Any], scheme: QuantScheme) -> Literal["plain", "balanced"]:
    """How errors of token classes weigh: by each linear's own ratios where those were measured, else alike."""
    measured = bool(report.get("layers")) and scheme.weight_bits >= FEWEST_WEIGHED_BITS
    return "balanced" if measured else "plain"
