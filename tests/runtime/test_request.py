"""One request through three engines against the same model in numpy."""

from pathlib import Path

import numpy as np
import pytest

from mbq_export.errors import MbqError
from mbq_export.runtime.request import Model, Prepared, Request
from tests.runtime import handmade
from tests.runtime.handmade import Bytes

FORMS = [(kv, logits) for kv in ("concat", "static") for logits in ("all", "last")]


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(handmade.TILE).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return handmade.model(tmp_path_factory.mktemp("graphs"))


@pytest.mark.parametrize(("kv", "logits"), FORMS)
def test_prefill_and_steps_give_the_logits_of_one_call_over_everything(
    tmp_path: Path, kv: str, logits: str
) -> None:
    model = handmade.model(tmp_path, kv=kv, logits=logits)
    w = handmade.weights()
    inputs = Bytes().inputs("where", [picture()])
    tokens = list(b"here")
    whole = handmade.reference_embeds(w, inputs)
    expected = handmade.reference_logits(w, np.concatenate([whole, w.embed[tokens]]))
    request = Request(model, Prepared(inputs=inputs))
    found = [request.prefill(), *(request.step(token) for token in tokens)]
    np.testing.assert_allclose(found, expected[-len(tokens) - 1 :], rtol=1e-4, atol=1e-4)


def test_pictures_change_the_rows_of_image_tokens_only(model: Model) -> None:
    inputs = Bytes().inputs("ab", [picture(1), picture(2)])
    embeds = Request(model, Prepared(inputs=inputs)).merged()
    expected = handmade.reference_embeds(handmade.weights(), inputs)
    assert embeds.shape == (1, 2 * handmade.ROWS_PER_TILE + 2, handmade.HIDDEN)
    np.testing.assert_allclose(embeds[0], expected, rtol=1e-5, atol=1e-5)


def test_without_pictures_the_vision_engine_is_not_run(model: Model) -> None:
    request = Request(model, Prepared(inputs=Bytes().inputs("text")))
    request.prefill()
    assert request.clock.laps["vision"] == []
    assert len(request.clock.laps["prefill"]) == 1


def test_visual_and_prompt_tokens_are_counted_apart() -> None:
    prepared = Prepared(inputs=Bytes().inputs("abc", [picture()]))
    assert (prepared.visual_tokens, prepared.prompt_tokens) == (handmade.ROWS_PER_TILE, 3)


def test_an_error_in_the_decoder_says_at_which_position(model: Model) -> None:
    request = Request(model, Prepared(inputs=Bytes().inputs("abc")))
    request.prefill()
    with pytest.raises(MbqError) as caught:
        request.forward(np.zeros((1, 1, handmade.HIDDEN + 1), np.float32))
    assert caught.value.where == ["decoder", "position 3"]
