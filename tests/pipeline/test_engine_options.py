"""Sizes and options of engines: what they become, and which contradict each other."""

from pathlib import Path

import pytest

from mbq_export.backends.base import SizeRange
from mbq_export.errors import UsageError
from mbq_export.pipeline.engine_options import LARGEST_CHUNK, EngineOptions


def test_decoder_takes_a_step_or_a_chunk_of_the_prompt() -> None:
    sizes = EngineOptions(max_batch=4, opt_tokens=8).decoder_sizes(4096)
    assert sizes["batch_size"] == SizeRange(smallest=1, typical=1, largest=4)
    assert sizes["sequence_length"] == SizeRange(smallest=1, typical=8, largest=LARGEST_CHUNK)


def test_short_context_bounds_the_chunk() -> None:
    assert EngineOptions().decoder_sizes(100)["sequence_length"].largest == 100


@pytest.mark.parametrize(("most", "typical"), [(1, 1), (3, 3), (10, 5)])
def test_typical_picture_fits_into_the_largest(most: int, typical: int) -> None:
    found = EngineOptions(max_tiles=most).vision_sizes("tiles")
    assert found == {"tiles": SizeRange(smallest=1, typical=typical, largest=most)}


def test_call_longer_than_a_chunk_is_refused() -> None:
    EngineOptions(opt_tokens=64).check(64)
    with pytest.raises(UsageError, match="--opt-tokens 65 is more") as error:
        EngineOptions(opt_tokens=65).check(64)
    assert error.value.code == "E2008"


def test_what_decides_the_result_is_in_the_fingerprint_and_no_path(tmp_path: Path) -> None:
    cache = tmp_path / "times"
    plain = EngineOptions().fingerprint()
    assert EngineOptions(plugin_lib=tmp_path).fingerprint() == plain
    assert EngineOptions(weight_streaming=True).fingerprint() != plain
    assert EngineOptions(timing_cache=cache).fingerprint() == plain
    cache.write_bytes(b"times")
    assert str(tmp_path) not in str(EngineOptions(timing_cache=cache).fingerprint())
    assert EngineOptions(timing_cache=cache).fingerprint() != plain
