"""Folding any scale leaves the function of a block as it was."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mbq_export.blocks.fold import divisor_of, fold, fold_unit, folds_safely
from mbq_export.blocks.stream import BlockStream
from mbq_export.errors import FormatError
from mbq_export.families.base import SMOOTH, LoadedModel, Smooth, TextShape
from tests.questions import questions, sample_model, tiny_model
from tests.tiny import Tiny

INVARIANT = 1e-5  # relative, float32: the bar for a scale that is exact on paper
MODELS = {
    "grouped query": tiny_model,
    "one head per value": lambda: tiny_model(Tiny(kv_heads=4, seed=1)),
    "one value head": lambda: tiny_model(Tiny(kv_heads=1, seed=3)),
    "the sample model": sample_model,
}


def random_scales(text: TextShape, *, seed: int) -> dict[str, np.ndarray]:
    """Scales over three orders of magnitude; heads that share a value channel share theirs."""
    generator = torch.Generator().manual_seed(seed)

    def spread(size: int) -> Tensor:
        return torch.exp(torch.randn(size, generator=generator) * 1.5)

    shared = spread(text.kv_heads * text.head_dim).reshape(text.kv_heads, 1, text.head_dim)
    copies = text.heads // text.kv_heads
    found = {
        "qkv": spread(text.hidden),
        "o": shared.expand(-1, copies, -1).reshape(-1),
        "gate_up": spread(text.hidden),
        "down": spread(text.intermediate),
    }
    return {unit: e.numpy() for unit, e in found.items()}


def last_rows(model: LoadedModel, units: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Output of the last block, un-folded and with random scales in the named units of every block."""
    stream = BlockStream(model)
    (batch,) = stream.begin(questions(model, 1))
    plain = folded = batch.hidden
    for index in range(len(stream)):
        with stream.block(index) as block, torch.no_grad():
            plain = stream.run(block, index, batch, plain)
            scales = random_scales(model.text, seed=index)
            chosen = {unit: scales[unit] for unit in units}
            fold(block, chosen, smooth=model.family.smooth, text=model.text)
            folded = stream.run(block, index, batch, folded)
    return plain, folded


@pytest.mark.parametrize(
    "units",
    [("qkv",), ("o",), ("gate_up",), ("down",), ("qkv", "o", "gate_up", "down")],
    ids="+".join,
)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_folding_changes_no_output(
    model: Callable[[], LoadedModel], units: tuple[str, ...]
) -> None:
    plain, folded = last_rows(model(), units)
    assert float((plain - folded).norm() / plain.norm()) <= INVARIANT


def test_folding_does_change_the_weights() -> None:
    model = tiny_model()
    with BlockStream(model).block(0) as block:
        before = {name: p.clone() for name, p in block.named_parameters()}
        scales = random_scales(model.text, seed=0)
        fold(block, scales, smooth=model.family.smooth, text=model.text)
        changed = {name for name, p in block.named_parameters() if not torch.equal(p, before[name])}
    kept = {"self_attn.q_proj.bias", "self_attn.k_proj.bias"}
    assert changed == set(before) - kept


def test_the_bias_of_a_norm_is_divided_too() -> None:
    torch.manual_seed(0)
    block = nn.Module()
    block.norm, block.first, block.second = nn.LayerNorm(8), nn.Linear(8, 4), nn.Linear(8, 3)
    nn.init.normal_(block.norm.bias)
    x, e = torch.randn(5, 8), torch.exp(torch.randn(8))
    before = [block.first(block.norm(x)), block.second(block.norm(x))]
    place = Smooth(source="norm", into=("first", "second"), unit="qkv")
    fold_unit(block, e, place=place, text=tiny_model().text)
    after = [block.first(block.norm(x)), block.second(block.norm(x))]
    for wanted, found in zip(before, after, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_value_channel_is_divided_once_for_all_its_readers() -> None:
    text = tiny_model().text  # 4 query heads read 2 value heads of 32
    e = torch.arange(1.0, 65).reshape(2, 1, 32).expand(2, 2, 32).reshape(-1)
    assert divisor_of(e, place=SMOOTH[1], text=text).tolist() == list(range(1, 65))


def refused(scales: dict[str, np.ndarray]) -> FormatError:
    model = tiny_model()
    with BlockStream(model).block(0) as block, pytest.raises(FormatError) as caught:
        fold(block, scales, smooth=model.family.smooth, text=model.text)
    assert caught.value.code == "E4314"
    return caught.value


def test_heads_that_share_a_value_channel_must_share_a_scale() -> None:
    error = refused({"o": np.linspace(1, 2, 128, dtype=np.float32)})
    assert error.message == "Heads that share a value row have different scales."
    assert error.why == "4 query heads read 2 value heads"


def test_an_unknown_unit_is_refused() -> None:
    assert refused({"qk": np.ones(128, np.float32)}).message == "Unknown unit 'qk'."


def test_a_scale_of_another_length_is_refused() -> None:
    error = refused({"down": np.ones(128, np.float32)})
    assert error.message == "A scale has shape (128,)."
    assert error.why == "the unit has 256 input channels"
    assert error.where == ["down"]


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan])
def test_a_scale_that_is_not_positive_is_refused(bad: float) -> None:
    e = np.ones(128, np.float32)
    e[5] = bad
    assert refused({"qkv": e}).message == "1 scales are not positive and finite."


def norm_block(*weights: float) -> nn.Module:
    block = nn.Module()
    block.input_layernorm = nn.RMSNorm(len(weights))
    block.input_layernorm.weight = nn.Parameter(torch.tensor(weights))
    return block


@pytest.mark.parametrize(
    ("weights", "e", "safe"),
    [
        ((1.0, 2.0), (1.0, 1.0), True),
        ((1.0, 2.0), (1.0, 2 / 65504), True),
        ((1.0, 2.0), (1.0, 1.9 / 65504), False),
        ((1.0, 1.0), (1.0, 2.0**24), True),
        ((1.0, 1.0), (1.0, 2.0**25), False),
        ((1.0, 0.0), (1.0, 1.0), True),
        ((1.0, 1e-9), (1.0, 2.0), True),
    ],
)
def test_a_norm_must_still_fit_half_precision(
    weights: tuple[float, ...], e: tuple[float, ...], safe: bool
) -> None:
    found = folds_safely(
        norm_block(*weights), torch.tensor(e), place=SMOOTH[0], text=tiny_model().text
    )
    assert found is safe


def test_a_tiny_weight_among_large_ones_is_no_lost_channel() -> None:
    """Trained matrices hold numbers close to zero everywhere; only whole channels can be lost."""
    model = tiny_model()
    with BlockStream(model).block(0) as block, torch.no_grad():
        block.get_parameter("mlp.up_proj.weight")[3, 5] = 1e-12
        ones = torch.ones(256)
        assert folds_safely(block, ones, place=SMOOTH[3], text=model.text)
        lost = ones.index_fill(0, torch.tensor([3]), 2.0**30)
        assert not folds_safely(block, lost, place=SMOOTH[3], text=model.text)
