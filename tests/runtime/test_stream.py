"""Answers in the making: pieces, ends, collapse and what it all cost."""

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mbq_export.backends.base import TensorSpec
from mbq_export.runtime.request import Engines, Model
from mbq_export.runtime.sampling import Options
from mbq_export.runtime.session import Session
from mbq_export.runtime.stream import Generation
from tests.runtime import handmade
from tests.runtime.handmade import Bytes


class Scripted:
    """A decoder that says what it is told, so that ends and collapse can be provoked at will."""

    inputs = (
        TensorSpec(name="embeds", dtype="float32", shape=(1, "t", handmade.HIDDEN)),
        TensorSpec(name="mask", dtype="int64", shape=(1, "total")),
        TensorSpec(name="positions", dtype="int64", shape=(1, "t")),
        TensorSpec(name="past", dtype="float32", shape=(1, 1, "past", 1)),
    )
    outputs = (
        TensorSpec(name="logits", dtype="float32", shape=(1, 1, handmade.VOCAB)),
        TensorSpec(name="present", dtype="float32", shape=(1, 1, "total", 1)),
    )

    def __init__(self, script: Sequence[int]) -> None:
        self.script = list(script)

    def run(self, feeds: dict[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        logits = np.zeros((1, 1, handmade.VOCAB), np.float32)
        logits[0, 0, self.script.pop(0)] = 1
        filled = feeds["past"].shape[2] + feeds["embeds"].shape[1]
        return {"logits": logits, "present": np.zeros((1, 1, filled, 1), np.float32)}

    def close(self) -> None:
        pass


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Engines]:
    engines = handmade.model(tmp_path).engines
    yield engines
    engines.close()


def says(parts: Engines, script: bytes, limit: int = 500) -> Session:
    engines = Engines(vision=parts.vision, embed=parts.embed, decoder=Scripted(script))  # type: ignore[arg-type]
    return Session(Model(engines=engines, preprocessor=Bytes(), merge=handmade.merge, limit=limit))


def answer(parts: Engines, script: bytes, **options: object) -> Generation:
    return says(parts, script).generate("q", options=Options(**options))  # type: ignore[arg-type]


def test_an_end_token_ends_the_answer_and_leaves_no_text(parts: Engines) -> None:
    found = answer(parts, b"yes\0no")
    assert (found.text, found.reason, found.ids[-1], len(found.ids)) == ("yes", "end", 0, 4)


def test_a_stop_string_ends_the_answer_before_it(parts: Engines) -> None:
    found = answer(parts, b"yes. no.", stop=(". ",))
    assert (found.text, found.reason) == ("yes", "stop")


def test_the_most_tokens_wanted_end_the_answer(parts: Engines) -> None:
    found = answer(parts, b"yesyesyes", max_new_tokens=4)
    assert (found.text, found.reason) == ("yesy", "length")


def test_a_fixed_length_ignores_end_tokens_and_collapse(parts: Engines) -> None:
    found = answer(parts, b"\0" * 40, max_new_tokens=40, ignore_end=True)
    assert (len(found.ids), found.reason, found.collapsed) == (40, "length", "")


def test_held_text_comes_with_the_last_token(parts: Engines) -> None:
    stream = says(parts, b"ab\0").stream("q", options=Options(stop=("bc",)))
    assert [token.text for token in stream] == ["a", "", "b"]
    assert stream.result().text == "ab"


def test_repetition_stops_the_answer_with_a_warning(
    parts: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="mbq_export"):
        found = answer(parts, b"so " + b"ha" * 40)
    assert found.reason == "collapse"
    assert found.text == "so " + "ha" * 6
    assert "W1105: the answer degenerates: the same 2 tokens 6 times in a row" in caplog.text


def test_an_empty_answer_is_a_warning_too(parts: Engines, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mbq_export"):
        found = answer(parts, b"\0")
    assert (found.text, found.reason, found.collapsed) == ("", "end", "no text at all")
    assert "W1105" in caplog.text


def test_a_good_answer_warns_of_nothing(parts: Engines, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mbq_export"):
        assert answer(parts, b"fine\0").collapsed == ""
    assert not caplog.text


def test_the_result_generates_what_was_not_asked_for_yet(parts: Engines) -> None:
    stream = says(parts, b"abc\0").stream("q")
    assert next(iter(stream)).text == "a"
    assert stream.result().text == "abc"
    assert stream.result() is stream.result()


def test_a_stream_that_was_closed_has_no_result(parts: Engines) -> None:
    stream = says(parts, b"abc\0").stream("q")
    tokens = iter(stream)
    next(tokens)
    tokens.close()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"closed or has failed"):
        stream.result()


def test_every_phase_is_timed_once_per_call(parts: Engines) -> None:
    picture = np.ones(handmade.TILE, np.float32)
    cost = says(parts, b"four\0").generate("q", [picture]).statistics
    assert (cost.visual_tokens, cost.prompt_tokens, cost.output_tokens) == (2, 1, 5)
    assert (len(cost.decode_ms), len(cost.sample_ms), len(cost.itl_ms)) == (4, 5, 4)
    before = cost.preprocess_ms + cost.vision_ms + cost.merge_ms + cost.prefill_ms
    assert 0 < before + cost.sample_ms[0] <= cost.ttft_ms
    assert all(gap >= decode for gap, decode in zip(cost.itl_ms, cost.decode_ms, strict=True))


def test_time_the_caller_spends_between_tokens_is_not_counted(parts: Engines) -> None:
    stream = says(parts, b"ab\0").stream("q")
    for _ in stream:
        time.sleep(0.05)
    assert stream.result().statistics.e2e_ms < 50
