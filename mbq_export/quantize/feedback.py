"""Blocks rounded with error feedback, one after the other, each on what the quantized blocks before it compute.

    qkv ─► o ─► gate_up ─► down          a unit's Gram matrices are taken with the units before it rounded
    once per way (Hessian, target); where there is a choice, held-out samples decide for the whole block

One block with its copies, the Gram matrices of one unit and the hidden rows are in memory; what a linear
reads is computed batch by batch and never kept.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from mbq_export.blocks.gram import Gram
from mbq_export.blocks.loss import ClassWeights
from mbq_export.blocks.ratios import prompt_weight_of, r_of, weighings
from mbq_export.blocks.reading import rows_read_by
from mbq_export.errors import UsageError, located
from mbq_export.quantize.apply import RoundedLinears
from mbq_export.quantize.clip import SKIPPED, ClippedGrids, clip_facts
from mbq_export.quantize.gptq import Rounded, factorise, retarget, round_linear
from mbq_export.quantize.held_out import clearly_better, losses
from mbq_export.quantize.streams import Pairs, Streams, rows_multiplied, with_codes
from mbq_export.schemes.base import CHANNEL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from mbq_export.blocks.stream import BlockStream
    from mbq_export.channel_scales import ChannelScales
    from mbq_export.families.base import LoadedModel, Smooth
    from mbq_export.families.inputs import ModelInputs
    from mbq_export.quantize.apply import Rounding
    from mbq_export.schemes.affine import Codes
    from mbq_export.schemes.base import QuantScheme

DIGITS: Final = 6


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What rounding looks at.

    Attributes:
        inputs: Encoded calibration samples, those of the channel scales.
        held_out: Others, which decide between ways of rounding; no picture is in both.
    """

    inputs: Sequence[ModelInputs]
    held_out: Sequence[ModelInputs] = ()


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to round a block.

    Attributes:
        hessian: Whether token classes weigh alike, or by each linear's own ratios.
        rho: How far weights are moved towards the full-precision output.
    """

    hessian: Literal["plain", "balanced"]
    rho: float


@dataclass(frozen=True, kw_only=True)
class RoundedBlock(RoundedLinears):
    """One block, rounded one way.

    Attributes:
        way: Which.
        block: A copy of the block that computes as its codes do.
        held_out: (samples,) J of held-out samples; None where nothing was to be decided.
    """

    way: Way
    block: nn.Module
    held_out: NDArray[np.float64] | None = None


class Feedback:
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
            UsageError: E2002 if classes are to be weighed and nothing was measured, E2018 without samples.
        """
        self._model, self._stream, self._scales = model, stream, scales
        self._rounding = rounding
        self._switches = scales.switches
        self._chooses = "auto" in {self._switches.hessian, self._switches.asym}
        self._check(samples)
        assert samples is not None  # checked
        of_prefix = self._switches.gptq_prefix == "quantized"
        exact = self._switches.asym != 0 or not of_prefix
        begin = Streams.begin
        self._seen = begin(stream, samples.inputs, exact=exact, moved=of_prefix)
        held_out = samples.held_out if self._chooses else ()
        self._held_out = begin(stream, held_out, exact=True, moved=of_prefix)

    def round(self, block: nn.Module, index: int) -> RoundedBlock:
        """Round a block the way its switches say, or held-out samples do.

        Args:
            block: With folded scales, in float32; not changed.
            index: Its position; the one after the block that was passed last.

        Raises:
            GateError: E1103 or E1110, naming the linear.
            FormatError: E4110 or E4112.
        """
        switches = self._switches
        wanted = self._wanted(block, index) if self._chooses else None
        first = Way(
            hessian="balanced" if switches.hessian == "balanced" else "plain",
            rho=0.0 if switches.asym == "auto" else float(switches.asym),
        )
        found = self._rounded(block, index, first, wanted)
        compared: dict[str, dict[str, float]] = {}
        if switches.hessian == "auto":
            other = self._rounded(block, index, replace(first, hessian="balanced"), wanted)
            compared["hessian"] = {"plain": _mean(found), "balanced": _mean(other)}
            found = _better(other, found)
        if switches.asym == "auto":
            other = self._rounded(block, index, replace(found.way, rho=1.0), wanted)
            compared["asym"] = {"0": _mean(found), "1": _mean(other)}
            found = _better(other, found)
        for facts in found.facts.values():
            facts["feedback"]["held_out"] = compared or None
        return found

    def go_on(self, block: nn.Module, index: int, codes: Mapping[str, Codes]) -> None:
        """Let all streams pass a block that is finished, now or by an earlier run.

        Args:
            block: With folded scales, in float32; not changed.
            index: Its position.
            codes: What is stored of it, by linear relative to the block.
        """
        rounded = with_codes(block, codes, scheme=self._scheme)
        for streams in (self._seen, self._held_out):
            streams.advance(self._stream, index, folded=block, rounded=rounded)

    @property
    def behind(self) -> Pairs:
        """Samples with the rows that leave the block that was passed last."""
        return self._seen.after

    @property
    def damp(self) -> float:
        """Share of its mean diagonal that a Hessian is damped with."""
        return float(self._switches.damp)

    def _rounded(
        self, block: nn.Module, index: int, way: Way, wanted: list[Tensor] | None
    ) -> RoundedBlock:
        """Round all units of a block one way."""
        path = self._model.family.blocks
        codes: dict[str, Codes] = {}
        facts: dict[str, dict[str, Any]] = {}
        partly = copy.deepcopy(block)
        for place in self._model.family.smooth:
            with located(f"{path}.{index}"), located(place.unit):
                found = self._unit(block, partly, index, place, way)
            these = {linear: rounded.codes for linear, (rounded, _) in found.items()}
            with_codes(partly, these, scheme=self._scheme, into=True)
            codes |= these
            facts |= {linear: _facts(*outcome, way) for linear, outcome in found.items()}
        held_out = None
        if wanted is not None:
            held_out = losses(
                self._stream,
                partly,
                index,
                after=self._held_out.after,
                wanted=wanted,
                weights=self._loss_weights(index),
            )
        return RoundedBlock(way=way, block=partly, codes=codes, facts=facts, held_out=held_out)

    def _unit(
        self, block: nn.Module, partly: nn.Module, index: int, place: Smooth, way: Way
    ) -> dict[str, tuple[Rounded, float]]:
        """Round the linears of a unit: each with the damping that was used."""
        gram, names = self._gram(block, partly, index, place, way)
        scheme = self._rounding.of(index, place.unit)
        factors = {}
        found = {}
        for linear in place.into:
            name = names[linear]
            with located(linear):
                if name not in factors:
                    hessian = gram.hessian(name)
                    factors = {name: (hessian, factorise(hessian, damp=self.damp))}
                hessian, factor = factors[name]
                weight = block.get_parameter(f"{linear}.weight").detach()
                if way.rho:
                    weight = retarget(weight, gram.shift(name), factor, rho=way.rho)
                rounded = round_linear(
                    weight,
                    hessian,
                    factor,
                    scheme=scheme,
                    group_size=self._rounding.group_size,
                    clipped=self._clipped(linear, gram, name, scheme),
                )
            found[linear] = (rounded, factor.damp)
        return found

    def _clipped(
        self, linear: str, gram: Gram, name: str, scheme: QuantScheme
    ) -> ClippedGrids | None:
        """Grids that clip a linear, None for one that keeps its range."""
        if self._switches.clip == "none" or linear in SKIPPED:
            return None
        group_size = self._rounding.group_size
        size = gram.columns // scheme.groups_of(gram.columns, group_size)
        return ClippedGrids(
            gram.diagonal_blocks(name, size),
            scheme=scheme,
            channel=group_size == CHANNEL,
        )

    def _gram(
        self, block: nn.Module, partly: nn.Module, index: int, place: Smooth, way: Way
    ) -> tuple[Gram, dict[str, str]]:
        """Gram matrices of a unit's inputs, and which of them each linear uses."""
        names, weights = weighings(self._report, index, place.into, alike=way.hessian == "plain")
        columns = int(block.get_parameter(f"{place.into[0]}.weight").shape[1])
        gram = Gram(columns, weights, shifted=way.rho != 0)
        rows_of = partial(rows_read_by, place.into[0], stream=self._stream, index=index)
        read = rows_of(block=partly, batches=self._seen.after)
        exact: Any = itertools.repeat(None)
        if way.rho:
            exact = rows_of(block=block, batches=self._seen.before)
        for batch, rows, target in zip(self._seen.batches, read, exact, strict=False):
            gram.add(rows_multiplied(rows, self._scheme), batch.classes, target)
        return gram, names

    @property
    def _scheme(self) -> QuantScheme:
        """What units have that have no format of their own; activations are alike in all."""
        assert self._rounding.scheme is not None  # there is something to round
        return self._rounding.scheme

    @property
    def _report(self) -> Mapping[str, Any]:
        return self._scales.sensitivity

    def _loss_weights(self, index: int) -> ClassWeights | None:
        """Weights of held-out errors: those of the MLP half, at whose end they are read."""
        if not self._report.get("layers"):
            return None
        forced = self._switches.modality_weight
        return ClassWeights(
            vision=r_of(self._report, index, "down") if forced is None else forced,
            prompt=prompt_weight_of(self._report, index, "down"),
        )

    def _wanted(self, block: nn.Module, index: int) -> list[Tensor]:
        return self._stream.run_all(block, index, self._held_out.before)

    def _check(self, samples: Samples | None) -> None:
        switches = self._switches
        if switches.hessian != "plain" and not self._report.get("layers"):
            raise UsageError(
                "E2002",
                f"--hessian {switches.hessian} weighs token classes, and their ratios were not measured.",
                why=f"the scales come from --method {switches.method}, which asked for no gradients",
                fix=("--hessian plain", "calibrate with --hessian balanced"),
            )
        if samples is None or not samples.inputs or (self._chooses and not samples.held_out):
            raise UsageError(
                "E2018",
                "Error feedback has no calibration data to look at.",
                why="it weighs rounding errors by what the linears read",
                fix=("--data calib.jsonl", "--rounding nearest"),
            )


def _better(second: RoundedBlock, first: RoundedBlock) -> RoundedBlock:
    assert second.held_out is not None  # there was a choice
    assert first.held_out is not None
    return second if clearly_better(second.held_out, first.held_out) else first


def _mean(rounded: RoundedBlock) -> float:
    assert rounded.held_out is not None  # there was a choice
    return _short(float(rounded.held_out.mean()))


def _facts(rounded: Rounded, damp: float, way: Way) -> dict[str, Any]:
    clip = {}
    if rounded.clipped is not None:
        clip = {"clip": clip_facts(rounded.clipped, way.hessian)}
    return {
        **clip,
        "rounding": rounded.rounding,
        "feedback": {
            "why": rounded.why,
            "hessian": way.hessian,
            "asym": way.rho,
            "damp": damp,
            "weighted_error": {"nearest": _short(rounded.nearest), "kept": _short(rounded.kept)},
        },
    }


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
