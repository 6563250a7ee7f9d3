"""A decoder that keeps its cache in its process, in both forms of the cache, on the double of TensorRT."""

from pathlib import Path

import numpy as np
import pytest

from mbq_export.backends._trt_host import kept_ports
from mbq_export.backends._trt_job import Job, Refused
from mbq_export.backends._trt_kept import KeptDecoder
from mbq_export.backends._trt_session import largest_shapes, runner_of
from mbq_export.backends.base import TensorSpec
from tests.backends import recorded_tensorrt as double

GRAPHS = {"static": double.SUMS, "grows": double.GROWING_SUMS}
KEY, PRESENT = "past_key_values.0.key", "present.0.key"


@pytest.fixture
def cuda() -> double.RecordedCuda:
    return double.RecordedCuda()


def kept(cuda: double.RecordedCuda, form: str) -> KeptDecoder:
    engine = double.decoder(cuda, graph=GRAPHS[form], aliases=form == "static")
    assert engine.grows == (form == "grows")
    return double.kept(engine)


@pytest.mark.parametrize("form", GRAPHS)
def test_both_caches_give_the_same_sums(form: str, cuda: double.RecordedCuda) -> None:
    decoder = kept(cuda, form)
    assert double.step(decoder, [1, 2], at=0) == [12.0, 1.0]
    assert double.step(decoder, [5], at=2) == [32.0, 2.0]
    assert double.step(decoder, [1, 2, 3, 4, 5, 6, 7], at=3) == [32.0 + 4 * 28, 9.0]
    assert double.step(decoder, [100], at=0, sequence=2) == [400.0, 0.0]


@pytest.mark.parametrize("form", GRAPHS)
def test_every_slot_can_be_filled_and_no_more(form: str, cuda: double.RecordedCuda) -> None:
    decoder = kept(cuda, form)
    for at in range(double.SLOTS):
        assert double.step(decoder, [1], at=at) == [4.0 * (at + 1), at]
    with pytest.raises(Refused, match="Position 17 is beyond 16 slots"):
        double.step(decoder, [1], at=double.SLOTS)


@pytest.mark.parametrize("form", GRAPHS)
def test_a_run_of_most_tokens_fits_behind_a_full_past(form: str, cuda: double.RecordedCuda) -> None:
    decoder = kept(cuda, form)
    first = double.SLOTS - double.CHUNK
    double.step(decoder, [1] * first, at=0)
    assert double.step(decoder, [1] * double.CHUNK, at=first)[0] == 4.0 * double.SLOTS


@pytest.mark.parametrize("form", GRAPHS)
def test_numbers_that_are_none_do_not_outlive_their_sequence(
    form: str, cuda: double.RecordedCuda
) -> None:
    decoder = kept(cuda, form)
    assert np.isnan(double.step(decoder, [np.nan, 1], at=0))[0]
    assert double.step(decoder, [1, 1], at=0, sequence=2) == [8.0, 1.0]


def test_growing_cache_has_two_buffers_that_change_places(cuda: double.RecordedCuda) -> None:
    decoder = kept(cuda, "grows")
    addresses = decoder.engine.context.addresses
    first = (addresses[KEY], addresses[PRESENT])
    assert first[0] != first[1]
    double.step(decoder, [1], at=0)
    assert (addresses[PRESENT], addresses[KEY]) == first
    double.step(decoder, [1], at=1)
    assert (addresses[KEY], addresses[PRESENT]) == first
    sizes = {decoder.engine.buffers[name].size for name in (KEY, PRESENT)}
    assert sizes == {2 * double.HEADS * (double.SLOTS + double.CHUNK) * double.HIDDEN}


def test_growing_cache_begins_with_one_hidden_position(cuda: double.RecordedCuda) -> None:
    decoder = kept(cuda, "grows")
    double.step(decoder, [1, 1], at=0)
    shapes = decoder.engine.context.shapes
    assert shapes[KEY] == (1, double.HEADS, 1, double.HIDDEN)
    assert shapes["attention_mask"] == (1, 3)
    mask = decoder.engine.buffers["attention_mask"]
    found = np.frombuffer(cuda.memory[mask.address].raw, np.int64)[:3]
    assert found.tolist() == [0, 1, 1]


def test_growing_cache_is_never_replayed(cuda: double.RecordedCuda) -> None:
    """A second sequence has the shapes of the first, and other addresses."""
    decoder = kept(cuda, "grows")
    for sequence in (1, 2, 3):
        for at in range(3):
            assert double.step(decoder, [1], at=at, sequence=sequence)[0] == 4.0 * (at + 1)
    assert cuda.calls.count("execute_async_v3") == 9
    assert "cuStreamBeginCapture_v2" not in cuda.calls


def test_a_context_that_refuses_an_address_is_told(
    cuda: double.RecordedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = kept(cuda, "grows")
    monkeypatch.setattr(double.Context, "set_tensor_address", lambda *_: False)
    with pytest.raises(Refused, match=f"refuses an address for {KEY}") as error:
        double.step(decoder, [1], at=0)
    assert error.value.kind == "trt-run"


def test_record_of_an_engine_says_which_cache_it_has(cuda: double.RecordedCuda) -> None:
    """Sizes that vary have names in the record; the largest come from its profile."""
    symbols = {
        "inputs_embeds": ["b", "t", double.HIDDEN],
        "position_ids": ["b", "t"],
        "attention_mask": ["b", "total"],
        KEY: ["b", double.HEADS, "past", double.HIDDEN],
        "logits": ["b", 1, double.VOCABULARY],
        PRESENT: ["b", double.HEADS, "total", double.HIDDEN],
    }
    largest = double.GROWING_SUMS.largest
    inputs = tuple(double.GROWING_SUMS.inputs)
    job = Job(
        op="session",
        workdir=Path(),
        flavour="trt",
        module="",
        link="",
        library="",
        inputs=inputs,
        outputs=("logits", PRESENT),
        shapes=symbols,
        profile={name: (largest[name],) * 3 for name in inputs},
    )
    assert largest_shapes(job) == largest
    engine = double.decoder(cuda, graph=double.GROWING_SUMS, aliases=False)
    decoder = runner_of(engine, job).__self__
    assert isinstance(decoder, KeptDecoder)
    assert (decoder.slots, decoder.chunk, decoder.width) == (double.SLOTS, double.CHUNK, 2)
    assert decoder.engine.grows
    ports = [
        tuple(TensorSpec(name=name, dtype="float16", shape=tuple(symbols[name])) for name in names)
        for names in (inputs, job.outputs)
    ]
    kept_inputs, kept_outputs = kept_ports(*ports)
    assert [spec.name for spec in kept_inputs][-1] == "sequence"
    assert [spec.name for spec in kept_outputs] == ["logits"]
