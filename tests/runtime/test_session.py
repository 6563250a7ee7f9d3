"""Sessions: greedy answers, forced answers and their limits, against the same model in numpy."""

from pathlib import Path

import numpy as np
import pytest

from mbq_export.backends.base import TensorSpec
from mbq_export.errors import BuildError, FormatError, GateError, UsageError
from mbq_export.runtime.request import Engines, Model
from mbq_export.runtime.sampling import Options
from mbq_export.runtime.session import Session
from tests.runtime import handmade
from tests.runtime.handmade import Bytes


def greedy(prompt: str, count: int) -> list[int]:
    """Tokens of the numpy model, the whole sequence run again for every token."""
    w = handmade.weights()
    embeds = handmade.reference_embeds(w, Bytes().inputs(prompt))
    tokens: list[int] = []
    while len(tokens) < count:
        tokens.append(int(handmade.reference_logits(w, embeds)[-1].argmax()))
        embeds = np.concatenate([embeds, w.embed[tokens[-1:]]])
    return tokens


@pytest.mark.parametrize("kv", ["concat", "static"])
def test_a_greedy_answer_is_that_of_the_model_without_a_cache(tmp_path: Path, kv: str) -> None:
    with Session(handmade.model(tmp_path, kv=kv, logits="last")) as session:
        for prompt in ("a", "what is it", "zebra"):
            found = session.generate(prompt, options=Options(max_new_tokens=20, ignore_end=True))
            assert list(found.ids) == greedy(prompt, 20)


@pytest.mark.parametrize("logits", ["all", "last"])
@pytest.mark.parametrize("kv", ["concat", "static"])
def test_forced_tokens_give_all_logits_whatever_the_graph_returns(
    tmp_path: Path, kv: str, logits: str
) -> None:
    inputs = Bytes().inputs("colour", [np.ones(handmade.TILE)], answer="red")
    w = handmade.weights()
    expected = handmade.reference_logits(w, handmade.reference_embeds(w, inputs))
    with Session(handmade.model(tmp_path, kv=kv, logits=logits)) as session:
        found = session.teacher_forced(inputs)
    assert found.shape == (len(inputs.input_ids), handmade.VOCAB)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_requests_do_not_see_each_other(tmp_path: Path) -> None:
    with Session(handmade.model(tmp_path)) as session:
        first = session.generate("first", options=Options(max_new_tokens=5))
        session.generate("another", options=Options(max_new_tokens=5))
        again = session.generate("first", options=Options(max_new_tokens=5))
    assert first.ids == again.ids


def test_two_answers_can_be_made_at_once(tmp_path: Path) -> None:
    with Session(handmade.model(tmp_path)) as session:
        options = Options(max_new_tokens=6, ignore_end=True)
        streams = [session.stream(prompt, options=options) for prompt in ("one", "two")]
        mixed = [[token.id for token in pair] for pair in zip(*streams, strict=True)]
        alone = [session.generate(prompt, options=options).ids for prompt in ("one", "two")]
    assert list(zip(*mixed, strict=True)) == alone


def test_a_request_without_room_for_its_answer_is_refused_before_anything_runs(
    tmp_path: Path,
) -> None:
    model = handmade.model(tmp_path, limit=10)
    model.engines.close()  # whatever runs now fails with E6011
    with pytest.raises(UsageError, match=r"needs 11 positions, the bundle allows 10") as caught:
        Session(model).stream("seven77", options=Options(max_new_tokens=4))
    assert caught.value.code == "E2009"
    assert caught.value.context == {"limit": 10, "need": 11}


def test_an_answer_may_fill_the_context_to_the_last_position(tmp_path: Path) -> None:
    with Session(handmade.model(tmp_path, limit=11)) as session:
        found = session.generate("seven77", options=Options(max_new_tokens=4, ignore_end=True))
    assert (len(found.ids), found.reason) == (4, "length")


def test_logits_that_are_not_finite_become_an_error_and_no_text(tmp_path: Path) -> None:
    w = handmade.weights()
    w.embed[ord("b"), 3] = np.nan
    with Session(handmade.model(tmp_path, w=w)) as session:
        one = Options(max_new_tokens=1)
        session.generate("aaa", options=one)
        with pytest.raises(GateError, match=r"128 of 128 logits are NaN") as caught:
            session.generate("abc", options=one)
        with pytest.raises(GateError):
            session.prefill(session.prepare("abc"))
    assert caught.value.code == "E1103"
    assert caught.value.where == ["token 0"]


def test_prefill_returns_the_logits_of_the_next_token(tmp_path: Path) -> None:
    with Session(handmade.model(tmp_path)) as session:
        prepared = session.prepare("next")
        logits = session.prefill(prepared)
        options = Options(max_new_tokens=1)
        assert session.generate(prepared, options=options).ids == (int(logits.argmax()),)


def test_a_session_refuses_a_graph_that_is_no_decoder(tmp_path: Path) -> None:
    model = handmade.model(tmp_path)
    engines = model.engines
    wrong = Engines(vision=engines.vision, embed=engines.embed, decoder=engines.vision)
    with pytest.raises(FormatError, match=r"tiles to features"):
        Session(Model(engines=wrong, preprocessor=Bytes(), merge=handmade.merge, limit=9))


def test_closing_twice_is_allowed_and_answering_afterwards_is_not(tmp_path: Path) -> None:
    session = Session(handmade.model(tmp_path))
    session.close()
    session.close()
    with pytest.raises(BuildError, match=r"is closed"):
        session.generate("x", options=Options(max_new_tokens=1))


def test_the_hand_made_decoder_has_the_ports_of_a_real_one(tmp_path: Path) -> None:
    inputs = handmade.model(tmp_path, kv="static").engines.decoder.inputs
    assert inputs[3] == TensorSpec(name="write_indices", dtype="int64", shape=(1,))
