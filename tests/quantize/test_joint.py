"""Ratios of several halves: the rounding of one, the tree that tries all, and which are tried again on all samples."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch

from mbq_export.blocks.halves import KINDS, Half
from mbq_export.blocks.loss import ClassWeights, class_totals, coefficients, token_counts
from mbq_export.blocks.stream import BlockStream
from mbq_export.errors import GateError
from mbq_export.quantize.apply import Rounding
from mbq_export.quantize.joint import (
    RATIOS,
    Joint,
    _contenders,
    combinations,
    round_shrunk,
    rounded,
)
from mbq_export.quantize.streams import Pairs, Streams
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.affine import dequantize, quantize
from tests.questions import questions, tiny_model
from tests.reference.clip import real
from tests.reference.feedback import Format

SAME = 1e-5
"""The same sums in another order, float32 rows."""
FORMATS = [("w3a16", 64), ("w4a8", 0), ("w4a8", 128)]


@pytest.mark.parametrize(("name", "size"), FORMATS)
def test_a_shrunk_range_keeps_its_codes_and_lets_outliers_saturate(name: str, size: int) -> None:
    scheme = SCHEMES[name]
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(size))
    kind = Format(bits=scheme.weight_bits, symmetric=scheme.symmetric, group_size=size)
    made = []
    for ratio in RATIOS:
        found = dequantize(round_shrunk(weight, ratio, scheme=scheme, group_size=size))
        parts = torch.split(weight, size or 256, dim=1)
        assert torch.equal(found, torch.cat([real(part, ratio, kind) for part in parts], dim=1))
        made.append(found)
    assert not any(torch.equal(made[0], other) for other in made[1:])


@pytest.mark.parametrize(("name", "size"), FORMATS)
def test_without_shrinking_it_is_plain_rounding(name: str, size: int) -> None:
    weight = torch.randn(5, 256, generator=torch.Generator().manual_seed(7))
    found = round_shrunk(weight, 1.0, scheme=SCHEMES[name], group_size=size)
    wanted = quantize(weight, scheme=SCHEMES[name], group_size=size)
    for part in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(found, part), getattr(wanted, part))
        assert getattr(found, part).dtype == getattr(wanted, part).dtype


def test_a_unit_is_rounded_to_its_own_format() -> None:
    joint, _ = joint_of()
    half = joint.halves[1]
    rounding = replace(joint.rounding, units={(0, "down"): SCHEMES["w4a16"]})
    exact = {name: half.block.get_parameter(f"{name}.weight").clone() for name in half.units}
    with rounded(half, 0.99, rounding):
        for name, unit in half.units.items():
            scheme = SCHEMES["w4a16" if unit == "down" else "w3a16"]
            wanted = dequantize(round_shrunk(exact[name], 0.99, scheme=scheme, group_size=64))
            assert torch.equal(half.block.get_parameter(f"{name}.weight"), wanted)
    for name, weight in exact.items():
        assert torch.equal(half.block.get_parameter(f"{name}.weight"), weight)


def test_combinations_begin_without_clipping_and_miss_none() -> None:
    found = combinations(3)
    assert found[0] == (1.0, 1.0, 1.0)
    assert len(set(found)) == 125
    assert found == sorted(found, reverse=True)


def joint_of(
    scheme: str = "w3a16", weights: ClassWeights | None = None, samples: int = 4
) -> tuple[Joint, Pairs]:
    """Both halves of the first block, and rows of a few samples."""
    model = tiny_model()
    stream = BlockStream(model)
    streams = Streams.begin(stream, questions(model, samples), exact=True, moved=False)
    with stream.block(0) as block:
        halves = tuple(
            Half(index=0, kind=kind, block=block.float(), smooth=model.family.smooth)
            for kind in KINDS
        )
    size = SCHEMES[scheme].group_sizes[-1] if SCHEMES[scheme].symmetric else 64
    return (
        Joint(
            halves=halves,
            stream=stream,
            rounding=Rounding(scheme=SCHEMES[scheme], group_size=size),
            loss="mae",
            weights=weights,
        ),
        streams.before,
    )


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_the_tree_gives_what_whole_blocks_one_by_one_give(scheme: str) -> None:
    weights = ClassWeights(vision=0.4, prompt=0.0)
    joint, batches = joint_of(scheme, weights)
    tried = [(1.0, 1.0), (0.98, 1.0), (0.98, 0.99), (0.985, 0.98)]
    found = joint.objectives(tried, batches, of=batches).sum(1)
    classes = torch.cat([batch.classes.flatten() for batch, _ in batches])
    width = batches[0][1].shape[-1]
    weigh = coefficients(token_counts(classes), width=width, loss="mae", weights=weights)
    block = joint.halves[0].block
    wanted = joint.stream.run_all(block, 0, batches)
    for place, ratios in enumerate(tried):
        moved = copy.deepcopy(block)
        halves = [Half(index=0, kind=h.kind, block=moved, smooth=h.smooth) for h in joint.halves]
        with (
            rounded(halves[0], ratios[0], joint.rounding),
            rounded(halves[1], ratios[1], joint.rounding),
        ):
            rows = joint.stream.run_all(moved, 0, batches)
        errors = torch.cat(
            [(a - b).abs().sum(-1).flatten() for a, b in zip(wanted, rows, strict=True)]
        )
        value = class_totals(errors.double(), classes) @ weigh
        assert float(found[place]) == pytest.approx(float(value), rel=SAME)


def test_nothing_is_left_of_a_search() -> None:
    joint, batches = joint_of("w4a8")
    block = joint.halves[0].block
    before = copy.deepcopy(block.state_dict())
    joint.search(batches, batches)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert not any(module._forward_pre_hooks for module in block.modules())


@pytest.mark.parametrize("weights", [None, ClassWeights(vision=0.2)])
def test_the_best_is_the_least_of_all(weights: ClassWeights | None) -> None:
    joint, batches = joint_of(weights=weights)
    found = joint.search(batches, batches)
    values = joint.objectives(combinations(2), batches, of=batches).sum(1)
    assert found.best == float(values.min())
    assert found.plain == float(values[0])
    assert found.ratios == combinations(2)[int(values.argmin())]
    assert found.exact == 25


def test_a_sample_ranks_and_all_samples_decide() -> None:
    joint, batches = joint_of(samples=8)
    few = batches[:-1]
    assert 1 < sum(len(batch.samples) for batch, _ in few) < 8
    found = joint.search(few, batches)
    assert found.exact < 25
    tried = combinations(2)
    values = dict(
        zip(tried, joint.objectives(tried, batches, of=batches).sum(1).tolist(), strict=True)
    )
    assert found.plain == pytest.approx(values[1.0, 1.0], rel=SAME)
    assert found.best == pytest.approx(values[found.ratios], rel=SAME)
    assert found.best <= found.plain


def test_equal_objectives_leave_the_larger_ratios() -> None:
    joint, batches = joint_of()
    for half in joint.halves:
        for linear in half.units:
            half.block.get_parameter(f"{linear}.weight").data.zero_()
    found = joint.search(batches, batches)
    assert (found.ratios, found.best) == ((1.0, 1.0), 0.0)


def test_contenders_are_two_best_the_close_and_the_plain() -> None:
    #                       plain       far         best        better in one   second
    scored = torch.tensor([[9.0, 9.0], [5.0, 5.0], [1.0, 1.0], [0.0, 5.0], [2.0, 2.0]])
    assert _contenders(scored.double(), samples=100) == [0, 2, 3, 4]
    assert _contenders(scored.double(), samples=2) == [0, 2, 4]
    assert _contenders(scored[:, :1].double(), samples=2) == [0, 1, 2, 3, 4]


def test_an_error_that_is_not_finite_is_refused() -> None:
    joint, batches = joint_of()
    joint.halves[0].block.get_parameter("post_attention_layernorm.weight").data.fill_(3e38)
    with pytest.raises(GateError, match="is not finite") as caught:
        joint.search(batches, batches)
    assert caught.value.code == "E1103"


def test_the_tree_computes_a_half_once_for_all_that_follow_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    joint, batches = joint_of()
    runs = dict.fromkeys(KINDS, 0)
    run = Half.run

    def counted(half, *arguments):  # type: ignore[no-untyped-def]  # a spy
        runs[half.kind] += 1
        return run(half, *arguments)

    monkeypatch.setattr(Half, "run", counted)
    joint.search(batches, batches)
    exact = 1
    assert runs == {"attn": 5 + exact, "mlp": 25 + exact}
    assert len(list(itertools.product(RATIOS, RATIOS))) == 25
