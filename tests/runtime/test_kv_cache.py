"""Caches that grow and caches that have slots, on hand-made ports and graphs."""

from dataclasses import dataclass

import numpy as np
import pytest

from mbq_export.backends.base import TensorSpec
from mbq_export.errors import FormatError, UsageError
from mbq_export.runtime.kv_cache import DecoderPorts, KvCache


@dataclass
class Ports:
    """An engine as far as its ports go."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def spec(name: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def decoder(*, slots: int | str = "past", dtype: str = "float32", layers: int = 2) -> Ports:
    indices = (spec("write_indices", "int64", 1),) if isinstance(slots, int) else ()
    caches = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    return Ports(
        inputs=(
            spec("inputs_embeds", dtype, "b", "t", 8),
            spec("attention_mask", "int64", "b", "total"),
            spec("position_ids", "int64", "b", "t"),
            *indices,
            *(spec(f"past_key_values.{name}", dtype, "b", 2, slots, 4) for name in caches),
        ),
        outputs=(
            spec("logits", "float32", "b", "t", 16),
            *(spec(f"present.{name}", dtype, "b", 2, slots, 4) for name in caches),
        ),
    )


def cache(ports: Ports, limit: int = 32) -> KvCache:
    return KvCache(ports=DecoderPorts.of(ports), limit=limit)  # type: ignore[arg-type]


def test_ports_are_told_apart_by_their_order() -> None:
    found = DecoderPorts.of(decoder(slots=16))  # type: ignore[arg-type]
    assert found.embeds.name == "inputs_embeds"
    assert found.write_indices is not None
    assert [port.name for port in found.past][:2] == [
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert [port.name for port in found.present][-1] == "present.1.value"


def test_an_empty_growing_cache_has_no_position_and_the_dtype_of_the_graph() -> None:
    fresh = cache(decoder(dtype="float16"))
    assert not fresh.static
    assert [tensor.shape for tensor in fresh.tensors] == [(1, 2, 0, 4)] * 4
    assert {tensor.dtype.name for tensor in fresh.tensors} == {"float16"}


def test_a_growing_cache_counts_positions_from_its_length() -> None:
    growing = cache(decoder())
    first = growing.feeds(np.zeros((1, 3, 8), np.float32))
    assert first["position_ids"].tolist() == [[0, 1, 2]]
    assert first["attention_mask"].tolist() == [[1, 1, 1]]
    assert "write_indices" not in first
    growing.take({f"present.{n}": np.ones((1, 2, 3, 4), np.float32) for n in NAMES}, 3)
    second = growing.feeds(np.zeros((1, 1, 8), np.float32))
    assert second["position_ids"].tolist() == [[3]]
    assert second["attention_mask"].tolist() == [[1, 1, 1, 1]]
    assert second["past_key_values.1.value"].shape == (1, 2, 3, 4)


def test_a_static_cache_says_where_to_write_and_masks_the_free_slots() -> None:
    static = cache(decoder(slots=6))
    first = static.feeds(np.zeros((1, 4, 8), np.float32))
    assert first["write_indices"].tolist() == [0]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0]]
    static.take({f"present.{n}": np.ones((1, 2, 6, 4), np.float32) for n in NAMES}, 4)
    second = static.feeds(np.zeros((1, 1, 8), np.float32))
    assert second["write_indices"].tolist() == [4]
    assert second["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0]]


def test_the_limit_and_the_need_are_named_when_the_context_is_full() -> None:
    growing = cache(decoder(), limit=4)
    with pytest.raises(UsageError, match=r"needs 5 positions, the bundle allows 4") as caught:
        growing.feeds(np.zeros((1, 5, 8), np.float32))
    assert caught.value.code == "E2009"
    assert "--max-context 5" in str(caught.value)


def test_a_static_cache_allows_no_more_than_its_slots() -> None:
    with pytest.raises(UsageError, match=r"allows 6"):
        cache(decoder(slots=6), limit=32).check(7)


def test_only_the_filled_part_of_a_static_cache_counts_as_read() -> None:
    static = cache(decoder(slots=8))
    static.take({f"present.{n}": np.ones((1, 2, 8, 4), np.float32) for n in NAMES}, 2)
    assert static.filled_bytes == 4 * (2 * 2 * 4) * 4


def test_a_decoder_that_keeps_its_cache_is_told_the_sequence_it_continues() -> None:
    whole = decoder()
    sequence = TensorSpec(name="sequence", dtype="int64", shape=(1,))
    kept = Ports(inputs=(whole.inputs[0], whole.inputs[2], sequence), outputs=whole.outputs[:1])
    inside, other = cache(kept, limit=4), cache(kept, limit=4)
    numbers = [
        c.feeds(np.zeros((1, 1, 8), np.float32))["sequence"].tolist() for c in (inside, other)
    ]
    assert numbers[0] != numbers[1]
    assert not inside.static
    assert (inside.slots, inside.filled_bytes) == (4, 0)
    fed = inside.feeds(np.zeros((1, 3, 8), np.float32))
    assert fed.keys() == {"inputs_embeds", "position_ids", "sequence"}
    inside.take({}, 3)
    assert inside.feeds(np.zeros((1, 1, 8), np.float32))["position_ids"].tolist() == [[3]]
    with pytest.raises(UsageError, match=r"allows 4"):
        inside.feeds(np.zeros((1, 2, 8), np.float32))


NAMES = ("0.key", "0.value", "1.key", "1.value")
GOOD = decoder()


@pytest.mark.parametrize(
    "ports",
    [
        Ports(inputs=GOOD.inputs[:3], outputs=GOOD.outputs),
        Ports(inputs=GOOD.inputs, outputs=GOOD.outputs[:-1]),
        Ports(inputs=decoder(slots=16).inputs, outputs=GOOD.outputs),
        Ports(inputs=(), outputs=()),
    ],
    ids=["no cache", "one cache output missing", "grows out of slots", "nothing"],
)
def test_a_graph_that_is_no_decoder_is_refused(ports: Ports) -> None:
    with pytest.raises(FormatError, match=r"other inputs or outputs") as caught:
        DecoderPorts.of(ports)  # type: ignore[arg-type]
    assert caught.value.code == "E4413"
