"""A model whose ranges several halves of blocks chose together."""

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mbq_export.backends.torch import fake_quant_model
from mbq_export.blocks.stream import BlockStream
from mbq_export.channel_scales import ChannelScales, Switches
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import GateError, UsageError
from mbq_export.families.base import ANSWER, PROMPT, VISION, LoadedModel
from mbq_export.quantize import joint, quantize
from mbq_export.quantize.block_search import evaluations
from mbq_export.quantize.dependency import partition
from mbq_export.quantize.feedback import Samples
from mbq_export.quantize.joint import RATIOS
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.oracle import dequantized
from mbq_export.state import State
from tests.quantize.seen import KilledError, bytes_of, check_resumed, report, rounded, samples
from tests.questions import tiny_model
from tests.reference import joint as reference
from tests.reference.clip import real
from tests.reference.feedback import Format
from tests.tiny import Tiny, random_scales, tiny_checkpoint

SAME = 1e-4
"""J is recorded with six digits, and the whole model adds up float32 rows in another order."""
DEEP = Tiny(layers=3)


def scales(model: LoadedModel, *, measured: bool = True, **switches: Any) -> ChannelScales:
    chosen = Switches(method="qvlm", **{"search_scope": "block", "tokens": "all", **switches})
    return ChannelScales(
        scales=random_scales(model).scales,
        sensitivity=report(model) if measured else {},
        calib={"switches": chosen.resolved()},
    )


def joints(checkpoint: QuantCheckpoint) -> dict[str, dict[str, Any]]:
    """What was recorded of each site."""
    return {row["joint"]["site"]: row["joint"] for row in checkpoint.info["linears"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> QuantCheckpoint:
    model = tiny_model(DEEP)
    return rounded(model, tmp_path_factory.mktemp("made") / "c", scales(model))


@pytest.fixture
def two_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 8 combinations: for tests to which it does not matter how many there are."""
    monkeypatch.setattr(joint, "RATIOS", (1.0, 0.98))


@pytest.mark.parametrize("measured", [True, False], ids=["balanced", "alike"])
def test_the_choice_is_the_best_of_all_combinations_of_whole_models(
    measured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint, "RATIOS", (1.0, 0.99, 0.98))
    model = tiny_model(DEEP)
    made = rounded(model, tmp_path / "c", scales(model, measured=measured))
    found = next(j for j in joints(made).values() if {s[0] for s in j["block"]} == {"0", "1"})
    tiny_checkpoint(tmp_path / "folded", model, scheme=None)
    folded = fake_quant_model(QuantCheckpoint.open(tmp_path / "folded"))
    r = {"attn": 0.3, "mlp": 0.6}[found["block"][-1].split(".")[1]]
    weights = {ANSWER: 1.0, VISION: r} if measured else dict.fromkeys((ANSWER, VISION, PROMPT), 1.0)
    tried = joint.combinations(len(found["block"]))
    values = reference.all_objectives(
        folded.module,
        model.family.blocks,
        found["block"],
        list(samples(model).inputs),
        weights,
        Format(bits=3, symmetric=False, group_size=64),
        tried,
    )
    assert found["J"]["plain"] == pytest.approx(values[tried[0]], rel=SAME)
    assert found["J"]["best"] == pytest.approx(values[tuple(found["ratios"])], rel=SAME)
    assert values[tuple(found["ratios"])] <= min(values.values()) * (1 + SAME)
    assert max(values.values()) > min(values.values()) * (1 + 100 * SAME)


def test_every_linear_is_rounded_with_the_ratio_of_its_half(
    made: QuantCheckpoint, tmp_path: Path
) -> None:
    model = tiny_model(DEEP)
    folded = tiny_checkpoint(tmp_path / "folded", model, scheme=None)
    kind = Format(bits=3, symmetric=False, group_size=64)
    for row in made.info["linears"]:
        weight = torch.from_numpy(np.array(folded.tensor(f"{row['name']}.weight"), np.float32))
        found = torch.from_numpy(dequantized(made.packed(row["name"]))).float()
        parts = torch.split(weight, 64, dim=1)
        wanted = [real(part, row["joint"]["ratio"], kind) for part in parts]
        assert torch.equal(found, torch.cat(wanted, dim=1))
    assert len({row["joint"]["ratio"] for row in made.info["linears"]}) > 1


def test_the_record_holds_partition_links_ratios_and_errors(made: QuantCheckpoint) -> None:
    found = joints(made)
    assert list(found) == [f"{layer}.{kind}" for layer in range(3) for kind in ("attn", "mlp")]
    links = [site["link"] for site in found.values()]
    assert links[0] is None
    blocks = partition([link["conditional-entropy"] for link in links[1:]])
    names = list(found)
    for sites in blocks:
        for position, site in enumerate(sites):
            facts = found[names[site]]
            assert facts["block"] == [names[each] for each in sites]
            assert facts["ratio"] == facts["ratios"][position]
            assert facts["J"]["best"] <= facts["J"]["plain"]
            assert (facts["exact"], facts["samples"]) == (len(RATIOS) ** len(sites), 5)
    assert any({s[0] for s in f["block"]} == {"0", "1"} for f in found.values()), (
        "none spans layers"
    )
    assert all(link["mutual-info"] >= 0 for link in links[1:])
    method = made.info["method"]
    assert (method["search_scope"], method["qvlm_measure"]) == ("block", "conditional-entropy")
    assert evaluations(blocks) == sum(5 ** len(sites) for sites in blocks)


@pytest.mark.usefixtures("two_ratios")
def test_the_other_measure_groups_by_its_own_links(made: QuantCheckpoint, tmp_path: Path) -> None:
    model = tiny_model(DEEP)
    found = joints(rounded(model, tmp_path / "c", scales(model, qvlm_measure="mutual-info")))
    known = joints(made)
    assert [f["link"] for f in found.values()] == [f["link"] for f in known.values()]
    links = [f["link"]["mutual-info"] for f in list(found.values())[1:]]
    names = list(found)
    wanted = [[names[site] for site in sites] for sites in partition(links)]
    assert {tuple(f["block"]) for f in found.values()} == set(map(tuple, wanted))
    assert {tuple(f["block"]) for f in known.values()} != set(map(tuple, wanted))


@pytest.mark.parametrize("scheme", [("w3a16", 64), ("w4a8", 0)], ids=lambda s: s[0])
def test_without_clipping_it_is_the_checkpoint_of_mbq(
    scheme: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (name, size) = tiny_model(DEEP), scheme
    monkeypatch.setattr(joint, "RATIOS", (1.0,))
    found = scales(model)
    rounded(model, tmp_path / "a", found, scheme=name, group_size=size)
    plain = Switches(method="mbq", tokens="all").resolved()
    rounded(
        model,
        tmp_path / "b",
        replace(found, calib={"switches": plain}),
        scheme=name,
        group_size=size,
    )
    first, second = (bytes_of(tmp_path / each) for each in "ab")
    assert {n for n in first if first[n] != second[n]} == {"mbq.json"}


@pytest.mark.usefixtures("two_ratios")
@pytest.mark.parametrize(
    ("scheme", "size", "tokens"), [("w3a16", 64, "all"), ("w4a8", 0, 2)], ids=["all", "few"]
)
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    scheme: str, size: int, tokens: Any, tmp_path: Path
) -> None:
    """After the first block, whose search already decided for the second."""
    model = tiny_model(DEEP)
    check_resumed(model, tmp_path, scales(model, tokens=tokens), scheme=scheme, group_size=size)


@pytest.mark.usefixtures("two_ratios")
def test_a_search_whose_record_is_lost_is_made_again(tmp_path: Path) -> None:
    model = tiny_model(DEEP)
    found = scales(model)
    rounded(model, tmp_path / "whole", found)

    def kill(done: int, total: int, note: str = "") -> None:
        if done == 1:
            raise KilledError

    with State.open(tmp_path / "work", {}) as state, pytest.raises(KilledError):
        rounded(model, tmp_path / "out", found, state=state, progress=kill)
    shutil.rmtree(tmp_path / "work" / "blocks" / "searches")
    shutil.rmtree(tmp_path / "work" / "blocks" / "links")
    with State.open(tmp_path / "work", {}) as state:
        rounded(model, tmp_path / "out", found, state=state)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@pytest.mark.usefixtures("two_ratios")
def test_few_samples_rank_and_all_decide(tmp_path: Path) -> None:
    model = tiny_model(DEEP)
    found = joints(rounded(model, tmp_path / "c", scales(model, tokens=2)))
    assert {f["samples"] for f in found.values()} <= {1, 2}
    assert all(f["J"]["best"] <= f["J"]["plain"] for f in found.values())


@pytest.mark.usefixtures("two_ratios")
def test_two_blocks_are_in_memory_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(DEEP, meta_blocks=True)
    held, most = 0, 0
    load = BlockStream.block

    @contextmanager
    def counted(stream: BlockStream, index: int) -> Iterator[torch.nn.Module]:
        nonlocal held, most
        held += 1
        most = max(most, held)
        with load(stream, index) as block:
            yield block
        held -= 1

    monkeypatch.setattr(BlockStream, "block", counted)
    rounded(model, tmp_path / "c", scales(model))
    assert (held, most) == (0, 2)


@pytest.mark.parametrize("given", [None, Samples(inputs=[])])
def test_no_samples_are_refused(given: Samples | None, tmp_path: Path) -> None:
    model = tiny_model(DEEP)
    with pytest.raises(UsageError, match="joint search has no calibration data") as caught:
        quantize(
            model,
            scales(model),
            scheme=SCHEMES["w3a16"],
            group_size=64,
            out=tmp_path / "c",
            samples=given,
        )
    assert caught.value.code == "E2018"


def test_rows_that_overflow_are_named_with_their_block(tmp_path: Path) -> None:
    model = tiny_model(DEEP)
    broken = replace(model, module=_overflowing(model))
    with pytest.raises(GateError, match="not finite") as caught:
        rounded(broken, tmp_path / "c", replace(scales(model), scales={}))
    assert caught.value.code == "E1103"
    assert caught.value.where[0] == "block 1"


def _overflowing(model: LoadedModel) -> torch.nn.Module:
    module = copy.deepcopy(model.module)
    norm = f"{model.family.blocks}.1.post_attention_layernorm.weight"
    module.get_parameter(norm).data.fill_(3e38)
    return module
