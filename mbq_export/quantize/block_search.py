"""Blocks rounded on grids whose ranges are shrunk by one ratio per half, found for several halves together.

    pass 1   all blocks in full precision: rows behind each half ──► dependency of neighbours ──► partition
    pass 2   block after block: the ratios of its halves, each found when the partition's block that holds it begins

A block of the partition may begin in one decoder block and end in the next; two are in memory then. What a search
found is kept in the state, because it may be needed after the decoder block where it began is finished.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from mbq_export.blocks.fold import fold
from mbq_export.blocks.halves import KINDS, LAST_UNIT, Half
from mbq_export.blocks.loss import ClassWeights
from mbq_export.blocks.ratios import prompt_weight_of, r_of
from mbq_export.errors import GateError, UsageError, located
from mbq_export.families.base import ANSWER, PROMPT, VISION
from mbq_export.quantize.apply import RoundedLinears
from mbq_export.quantize.dependency import (
    CONDITIONAL_ENTROPY,
    MUTUAL_INFORMATION,
    conditional_entropy,
    draw_numbers,
    joint_distribution,
    mutual_information,
    partition,
)
from mbq_export.quantize.exponents import descend, refold, searched_exponents
from mbq_export.quantize.joint import RATIOS, Joint, moved, round_shrunk
from mbq_export.quantize.streams import Streams

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from mbq_export.blocks.stream import BlockStream
    from mbq_export.channel_scales import ChannelScales
    from mbq_export.families.base import LoadedModel
    from mbq_export.families.inputs import ModelInputs
    from mbq_export.quantize.apply import Rounding
    from mbq_export.quantize.feedback import Samples
    from mbq_export.quantize.streams import Pairs
    from mbq_export.schemes.affine import Codes
    from mbq_export.state import State

logger = logging.getLogger(__name__)

LINKS: Final = "links"
SEARCHES: Final = "searches"
"""Names of the two kinds of finished work in a `State`."""
DIGITS: Final = 6


class BlockSearch:
    """Rounds the blocks of a model in their order."""

    def __init__(
        self,
        model: LoadedModel,
        stream: BlockStream,
        scales: ChannelScales,
        samples: Samples | None,
        *,
        rounding: Rounding,
        state: State | None = None,
    ) -> None:
        """Measure how sites depend on each other, and group them.

        Raises:
            UsageError: E2018 without samples, E2002 if exponents are to move and there are none.
            GateError: E1103 naming the block whose rows are not finite.
        """
        if samples is None or not samples.inputs:
            raise UsageError(
                "E2018",
                "The joint search has no calibration data to look at.",
                why="it compares what reaches the end of several halves with full precision",
                fix=("--data calib.jsonl", "--search-scope linear"),
            )
        if scales.switches.search_alpha and not searched_exponents(scales):
            raise UsageError(
                "E2002",
                "--search-alpha has no exponent to move.",
                why="no unit has a scale that was searched with an exponent above 0",
                fix=("leave --search-alpha out", "--method qvlm"),
            )
        self._model, self._stream, self._scales = model, stream, scales
        self._rounding, self._state = rounding, state
        self._switches = scales.switches
        self._seed = int(scales.calib.get("seed", 0))
        self._links = self._measured(samples.inputs)
        self._partition = partition(self._links[self._switches.qvlm_measure])
        self._found: dict[int, Mapping[str, Any]] = {}
        self._refolded = -1
        whole = Streams.begin(stream, samples.inputs, exact=True, moved=False)
        few = self._few(samples.inputs)
        self._whole = whole
        self._few_rows = (
            Streams.begin(stream, few, exact=True, moved=False)
            if len(few) < len(samples.inputs)
            else None
        )
        logger.warning(
            "      search      %d blocks of %s halves: %d evaluations on %d of %d samples",
            len(self._partition),
            "-".join(str(len(sites)) for sites in self._partition),
            evaluations(self._partition),
            len(few),
            len(samples.inputs),
        )

    def round(self, block: nn.Module, index: int) -> RoundedLinears:
        """Round all linears of a block.

        Args:
            block: With folded scales, in float32; changed only where exponents of its scales move.
            index: Its position; the one after the block that was passed last.

        Raises:
            GateError: E1103, naming the halves.
            FormatError: E4112.
        """
        made = RoundedLinears()
        self._search_those_begun(block, index)
        self._refold(block, index)
        for half in self._halves_of(block, index):
            number = self._number(half)
            facts = self._facts(number)
            for linear, unit in half.units.items():
                weight = block.get_parameter(f"{linear}.weight").detach()
                with located(linear):
                    made.codes[linear] = round_shrunk(
                        weight,
                        facts["ratio"],
                        scheme=self._rounding.of(index, unit),
                        group_size=self._rounding.group_size,
                    )
                made.facts[linear] = {"joint": facts}
                moved = facts.get("exponents", {}).get(f"{index}.{unit}")
                if moved is not None:
                    made.facts[linear]["alpha"] = moved
        return made

    def go_on(self, block: nn.Module, index: int, codes: Mapping[str, Codes]) -> None:  # noqa: ARG002
        """Let the rows pass a block that is finished, now or by an earlier run.

        Args:
            block: As `round` left it, or with folded scales where it is not called.
            index: Its position.
            codes: What is stored of it; the rows are those of full precision, and do not depend on it.
        """
        if self._refolded != index:
            self._search_those_begun(block, index)
            self._refold(block, index)
        for streams in (self._whole, self._few_rows):
            if streams is not None:
                streams.advance(self._stream, index, folded=block, rounded=block)

    def _refold(self, block: nn.Module, index: int) -> None:
        """Fold the exponents that searches moved."""
        self._refolded = index
        found = [record.get("exponents", {}) for record in self._found.values()]
        moved = {
            (index, name.partition(".")[2]): alpha
            for exponents in found
            for name, alpha in exponents.items()
            if name.startswith(f"{index}.")
        }
        for half in self._halves_of(block, index) if moved else ():
            refold(half, self._scales, moved, text=self._model.text)

    def _search_those_begun(self, block: nn.Module, index: int) -> None:
        """Search the partition's blocks that begin in a decoder block, unless that was done before."""
        for number, sites in enumerate(self._partition):
            if sites[0] // 2 != index or number in self._found:
                continue
            kept = self._state.load_block(SEARCHES, number) if self._state else None
            if kept is not None:
                self._found[number] = kept.record
                continue
            with located(" + ".join(map(_name, sites))):
                record = self._searched(block, index, sites)
            self._found[number] = record
            if self._state:
                self._state.save_block(SEARCHES, number, {}, record)

    def _searched(self, block: nn.Module, index: int, sites: Sequence[int]) -> dict[str, Any]:
        """Search one block of the partition, with the next decoder block if it ends there."""
        if sites[-1] // 2 == index:
            return self._over(sites, self._halves_of(block, index))
        with self._stream.block(index + 1) as second:
            scales = self._scales.of_block(index + 1)
            fold(second.float(), scales, smooth=self._model.family.smooth, text=self._model.text)
            halves = [*self._halves_of(block, index), *self._halves_of(second, index + 1)]
            return self._over(sites, halves)

    def _over(self, sites: Sequence[int], halves: Sequence[Half]) -> dict[str, Any]:
        """Search over the halves of some sites, given all of the first decoder block and of the next."""
        inside = tuple(half for half in halves if self._number(half) in sites)
        before = tuple(half for half in halves if self._number(half) < sites[0])
        joint = Joint(
            halves=inside,
            stream=self._stream,
            rounding=self._rounding,
            loss=self._switches.loss,
            weights=self._weights(inside[-1]),
        )
        whole = self._rows(self._whole, before)
        few = whole if self._few_rows is None else self._rows(self._few_rows, before)
        chosen = joint.search(few, whole)
        errors = {"plain": _short(chosen.plain), "best": _short(chosen.best)}
        record = {
            "ratios": list(chosen.ratios),
            "J": errors,
            "samples": sum(len(batch.samples) for batch, _ in few),
            "exact": chosen.exact,
        }
        if self._switches.search_alpha:
            text = self._model.text
            found = descend(joint, chosen.ratios, whole, self._scales, text=text)
            errors["moved"] = _short(found.error)
            record["exponents"] = {
                f"{layer}.{unit}": alpha for (layer, unit), alpha in sorted(found.exponents.items())
            }
        return record

    def _rows(self, streams: Streams, before: Sequence[Half]) -> Pairs:
        """Rows before the first half of a search, as full precision has them."""
        rows = streams.before
        for half in before:
            rows = moved(rows, half.run(self._stream, rows))
        return rows

    def _facts(self, number: int) -> dict[str, Any]:
        """What `mbq.json` says of a linear of a site."""
        place = next(i for i, sites in enumerate(self._partition) if number in sites)
        sites, record = self._partition[place], self._found[place]
        links = {name: float(values[number - 1]) for name, values in self._links.items()}
        return {
            "site": _name(number),
            "link": links if number else None,
            "block": [_name(site) for site in sites],
            "ratio": record["ratios"][sites.index(number)],
            **record,
        }

    def _weights(self, last: Half) -> ClassWeights | None:
        """Weights of errors behind a half; all tokens weigh alike where nothing was measured."""
        report, switches = self._scales.sensitivity, self._switches
        if not report.get("layers"):
            return None
        forced, unit = switches.modality_weight, LAST_UNIT[last.kind]
        measured = switches.search_prompt_weight == "measured"
        return ClassWeights(
            vision=r_of(report, last.index, unit) if forced is None else forced,
            prompt=prompt_weight_of(report, last.index, unit) if measured else 0.0,
        )

    def _few(self, inputs: Sequence[ModelInputs]) -> list[ModelInputs]:
        """Samples that every combination is scored on: drawn until each class that weighs has its tokens."""
        if self._switches.tokens == "all":
            return list(inputs)
        kinds = [VISION, ANSWER]
        if not self._scales.sensitivity.get("layers"):
            kinds.append(PROMPT)
        rng = np.random.default_rng([self._seed, len(inputs)])
        order = rng.permutation(len(inputs))
        tokens = np.array([[(inputs[i].token_classes == k).sum() for k in kinds] for i in order])
        wanted = np.minimum(tokens.sum(0), int(self._switches.tokens))
        enough = (tokens.cumsum(0) >= wanted).all(1)
        return [inputs[place] for place in np.sort(order[: int(enough.argmax()) + 1])]

    def _measured(self, inputs: Sequence[ModelInputs]) -> dict[str, np.ndarray]:
        """Dependency of every site and the next under both measures, six digits."""
        kept = self._state.load_block(LINKS, 0) if self._state else None
        if kept is not None:
            return {name: np.array(values) for name, values in kept.tensors.items()}
        joints = self._joints(inputs)
        pairs = [(conditional_entropy(joint), mutual_information(joint)) for joint in joints]
        columns = np.array([[_short(value) for value in pair] for pair in pairs], np.float64)
        columns = columns.reshape(-1, 2)
        found = {
            CONDITIONAL_ENTROPY: columns[:, 0].copy(),
            MUTUAL_INFORMATION: columns[:, 1].copy(),
        }
        if self._state:
            self._state.save_block(LINKS, 0, found, {})
        return found

    def _joints(self, inputs: Sequence[ModelInputs]) -> Iterator[Tensor]:
        """Joint distribution of every site and the next, from one pass in full precision."""
        assert self._rounding.scheme is not None  # there is something to round
        streams = Streams.begin(self._stream, inputs, exact=True, moved=False)
        width = streams.before[0][1].shape[-1]
        tokens, channels = draw_numbers(streams.batches, width, seed=[self._seed])
        last: Tensor | None = None
        for index in range(len(self._stream)):
            with located(f"block {index}"), self._stream.block(index) as block:
                for half in self._halves_of(block.float(), index):
                    rows = moved(streams.before, half.run(self._stream, streams.before))
                    streams.exact = [each for _, each in rows]
                    flat = [each.flatten(0, 1) for each in streams.exact]
                    drawn = [each[at][:, channels] for each, at in zip(flat, tokens, strict=True)]
                    numbers = torch.cat(drawn).flatten()
                    _check_finite(numbers)
                    if last is not None:
                        yield joint_distribution(
                            last, numbers, bits=self._rounding.scheme.weight_bits
                        )
                    last = numbers

    def _halves_of(self, block: nn.Module, index: int) -> tuple[Half, ...]:
        smooth = self._model.family.smooth
        return tuple(Half(index=index, kind=k, block=block, smooth=smooth) for k in KINDS)

    @staticmethod
    def _number(half: Half) -> int:
        return 2 * half.index + KINDS.index(half.kind)


def evaluations(blocks: Sequence[Sequence[int]]) -> int:
    """Combinations that a joint search of these blocks tries."""
    return sum(len(RATIOS) ** len(sites) for sites in blocks)


def _check_finite(numbers: Tensor) -> None:
    bad = int((~torch.isfinite(numbers)).sum())
    if bad:
        raise GateError(
            "E1103",
            f"{bad} of {len(numbers)} numbers behind a half of the block are not finite.",
            why="activations or weights overflow",
            fix="check the weights: mbq-export inspect MODEL",
        )


def _name(site: int) -> str:
    return f"{site // 2}.{KINDS[site % 2]}"


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
