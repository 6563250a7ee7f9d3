"""An int8 cache on the oracle: only rows of the asked class move, and the cost is that of the definition."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mbq_export.evaluate.cache_rounding import cache_checks, rounded_rows
from mbq_export.evaluate.metrics import divergences
from mbq_export.evaluate.samples import parity_samples
from mbq_export.evaluate.sides import answer_rows, prompt_of
from mbq_export.families.base import ANSWER, PROMPT, VISION, LoadedModel
from mbq_export.families.inputs import ModelInputs
from tests.questions import sample_model, tiny_model

COUNT = 2
FLOAT32_RELATIVE = 1e-3
"""A KL of 1e-5 nats from logits of float32, once through our cache and once through hooks."""


@pytest.fixture(scope="module")
def samples() -> list[ModelInputs]:
    return parity_samples(None, COUNT, sample_model().processor)


def slow_rows(x: Tensor, chosen: Tensor) -> Tensor:
    """Row by row, in numbers."""
    found = x.clone()
    for batch, head, token in np.ndindex(*x.shape[:3]):
        if chosen[token]:
            row = x[batch, head, token]
            step = max(float(row.abs().max()), 1e-5) / 127
            found[batch, head, token] = torch.round(row / step) * step
    return found


def test_rows_of_chosen_tokens_are_rounded_alone() -> None:
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([True, False, True, True, False])
    found = rounded_rows(x, chosen)
    assert torch.allclose(found, slow_rows(x, chosen), rtol=0, atol=1e-6)
    assert torch.equal(found[:, :, ~chosen], x[:, :, ~chosen])
    assert not torch.equal(found[:, :, chosen], x[:, :, chosen])


def with_rounded_values(model: LoadedModel, sample: ModelInputs, kind: int) -> np.ndarray:
    """Logits with values alone rounded, by hooks on v_proj, whose output is what a cache keeps of values."""
    text = model.text
    chosen = torch.from_numpy(sample.token_classes == kind)

    def hook(_module: nn.Module, _args: object, out: Tensor) -> Tensor:
        heads = out.unflatten(-1, (text.kv_heads, text.head_dim)).transpose(1, 2)
        return rounded_rows(heads, chosen).transpose(1, 2).flatten(2)

    paths = [model.family.linear_path(n, "self_attn.v_proj") for n in range(text.layers)]
    handles = [model.module.get_submodule(p).register_forward_hook(hook) for p in paths]
    with torch.no_grad():
        logits = model.module(**sample.tensors(), use_cache=False).logits[0].numpy()
    for handle in handles:
        handle.remove()
    return np.asarray(logits)


def test_cost_of_values_is_that_of_hooks_on_the_model_s_own_code(
    samples: list[ModelInputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = sample_model(), [0]

    def values_only(x: Tensor, chosen: Tensor) -> Tensor:
        calls[0] += 1
        return x if calls[0] % 2 else rounded_rows(x, chosen)  # keys come first

    monkeypatch.setattr("mbq_export.evaluate.cache_rounding.rounded_rows", values_only)
    found = {check.modality: check.value for check in cache_checks(model, samples)}
    for name, kind in (("vision", VISION), ("prompt", PROMPT), ("answer", ANSWER)):
        nats = []
        for sample in samples:
            with torch.no_grad():
                exact = model.module(**sample.tensors(), use_cache=False).logits[0].numpy()
            sides = (exact, with_rounded_values(model, sample, kind))
            nats.append(divergences(*(answer_rows(side, prompt_of(sample)) for side in sides)))
        wanted = float(np.concatenate(nats).mean())
        assert found[name] == pytest.approx(wanted, rel=FLOAT32_RELATIVE, abs=1e-9)
        assert wanted > 0


def test_every_class_and_all_are_told_without_a_limit(samples: list[ModelInputs]) -> None:
    checks = cache_checks(sample_model(), samples)
    assert [check.modality for check in checks] == ["vision", "prompt", "answer", ""]
    assert {check.name for check in checks} == {"cache.kl"}
    assert all(check.ok and check.threshold is None for check in checks)
    values = [check.value for check in checks]
    assert all(0 < value < 0.01 for value in values)


def test_a_class_that_does_not_occur_is_not_run() -> None:
    model = tiny_model()
    text = model.processor.inputs("what?", [], "yes")
    found = {check.modality: check for check in cache_checks(model, [text])}
    assert (found["vision"].ok, found["vision"].why) == (None, "the samples have no such tokens")
    assert found["prompt"].ok
