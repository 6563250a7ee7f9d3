"""Sessions on real exported graphs, held to what transformers itself generates."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from mbq_export.backends.ort import open_graph
from mbq_export.backends.torch import fake_quant_model
from mbq_export.bundle import Bundle
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import UsageError
from mbq_export.evaluate.samples import parity_samples
from mbq_export.evaluate.sides import Oracle, prompt_of
from mbq_export.export import ops, record
from mbq_export.export.record import GraphForm
from mbq_export.families.base import LoadedModel
from mbq_export.families.inputs import ModelInputs
from mbq_export.runtime import (
    DECODER,
    EMBED,
    HOST_TENSORS,
    NEWLINE,
    RECORD,
    VISION,
    Session,
    Tuning,
    default_lowering,
    graph_record,
    lowerings_of,
    open_session,
)
from mbq_export.runtime.request import Engines, Prepared
from mbq_export.runtime.sampling import Options
from mbq_export.schemes.base import CHANNEL
from tests.evaluate.bundles import sample_bundle_of_rounded_activations
from tests.runtime.bundles import QDQ, REFERENCE, rounded_bundle
from tests.tiny import load_tiny

ON_TENSORRT = GraphForm(lowering="qdq", target="trt", dtype="fp16", kv="static", logits="last")
NEW_TOKENS = 12
PROMPTS = ("how many objects are there ?", "what is at the top ?", "is there a red circle ?")


@dataclass(frozen=True)
class Subject:
    """A bundle and the transformers model that its checkpoint stands for."""

    bundle: Bundle
    oracle: LoadedModel


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("tiny")
    model = load_tiny(folder / "model")
    forms = (QDQ, REFERENCE, ON_TENSORRT)
    bundle = rounded_bundle(folder / "bundle", model, forms=forms)
    checkpoint = QuantCheckpoint.open(bundle.checkpoint_folder)
    return Subject(bundle=bundle, oracle=fake_quant_model(checkpoint))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("full")
    return rounded_bundle(folder / "bundle", load_tiny(folder / "model"), scheme=None)


@pytest.fixture(params=["qdq", "reference", "torch:cpu", "oracle"])
def session(subject: Subject, request: pytest.FixtureRequest) -> Iterator[Session]:
    backend = request.param in {"torch:cpu", "oracle"}
    how = {"backend": request.param} if backend else {"lowering": request.param}
    with open_session(subject.bundle, threads=1, **how) as opened:
        yield opened


def pictures(count: int) -> list[Image.Image]:
    draws = np.random.default_rng(count)
    return [Image.fromarray(draws.integers(0, 256, (48, 48, 3), np.uint8)) for _ in range(count)]


def generated(model: LoadedModel, inputs: ModelInputs) -> list[int]:
    """What transformers generates greedily."""
    with torch.no_grad():
        found = model.module.generate(
            **inputs.tensors(), max_new_tokens=NEW_TOKENS, do_sample=False
        )
    return list(map(int, found[0, len(inputs.input_ids) :]))


def logits(model: LoadedModel, inputs: ModelInputs) -> np.ndarray:
    with torch.no_grad():
        return model.module(**inputs.tensors()).logits[0].numpy()


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("images", [0, 1, 3])
def test_greedy_answers_are_those_of_transformers(
    subject: Subject, session: Session, images: int
) -> None:
    for prompt in PROMPTS:
        inputs = subject.oracle.processor.inputs(prompt, pictures(images))
        found = session.generate(
            prompt, pictures(images), options=Options(max_new_tokens=NEW_TOKENS)
        )
        assert list(found.ids) == generated(subject.oracle, inputs)
        assert found.text == subject.oracle.processor.decode(found.ids)


def test_forced_logits_are_those_of_transformers(subject: Subject, session: Session) -> None:
    inputs = subject.oracle.processor.inputs(PROMPTS[0], pictures(1), answer="a red circle")
    found = session.teacher_forced(inputs)
    assert found.shape == (len(inputs.input_ids), subject.oracle.text.vocab)
    assert relative(found, logits(subject.oracle, inputs)) < 1e-5


def test_a_static_half_precision_cache_follows_the_oracle(subject: Subject) -> None:
    """The graph for TensorRT runs on ONNX Runtime too: slots, write indices and fp16 feeds."""
    onnx = subject.bundle.onnx
    with open_session(subject.bundle, threads=1) as opened:
        opened.model.engines.decoder.close()
        engines = Engines(
            vision=opened.model.engines.vision,
            embed=opened.model.engines.embed,
            decoder=open_graph(onnx / ON_TENSORRT.file_name, threads=1),
        )
        session = Session(replace(opened.model, engines=engines))
        inputs = subject.oracle.processor.inputs(PROMPTS[1], pictures(1), answer="blue")
        found = session.teacher_forced(inputs)
    assert relative(found, logits(subject.oracle, inputs)) < 1e-2


def test_the_fast_level_is_a_variant_of_its_own(subject: Subject) -> None:
    inputs = subject.oracle.processor.inputs(PROMPTS[0], pictures(1))
    wanted = logits(subject.oracle, inputs)
    with open_session(subject.bundle, threads=1, tuning=Tuning(accuracy_level=4)) as fast:
        assert 1e-4 < relative(fast.teacher_forced(inputs), wanted) < 0.1


@pytest.mark.parametrize("backend", ["ort", "torch:cpu"])
def test_a_bundle_without_quantized_linears_answers_too(full: Bundle, backend: str) -> None:
    oracle = fake_quant_model(QuantCheckpoint.open(full.checkpoint_folder))
    inputs = oracle.processor.inputs(PROMPTS[0], pictures(1))
    with open_session(full, backend=backend, threads=1) as session:
        assert relative(session.teacher_forced(inputs), logits(oracle, inputs)) < 1e-5


def test_the_context_of_the_bundle_is_the_limit(subject: Subject) -> None:
    small = replace(subject.bundle, manifest={"limits": {"max_context": 64}})
    with open_session(small, threads=1) as session, pytest.raises(UsageError) as caught:
        session.stream(PROMPTS[0], pictures(1))
    assert caught.value.code == "E2009"
    assert caught.value.context["limit"] == 64


def test_sessions_are_named_by_what_runs_them(session: Session) -> None:
    assert session.name in {"ort:qdq", "ort:reference", "torch:cpu", "oracle"}


def test_an_unknown_device_lists_the_known_ones(full: Bundle) -> None:
    with pytest.raises(UsageError, match=r"Unknown device 'tpu'(?s:.*)known: auto, cpu, cuda"):
        open_session(full, backend="torch:tpu")


def test_a_graph_that_is_not_there_is_refused_with_those_that_are(full: Bundle) -> None:
    with pytest.raises(UsageError, match=r"no fp32 graph decoder_model_merged reference") as caught:
        open_session(full, lowering="reference")
    assert caught.value.code == "E2001"
    assert "decoder_model_merged_qdq_ort.onnx" in caught.value.why


def test_a_bundle_without_engines_names_what_runs_instead(full: Bundle) -> None:
    with pytest.raises(UsageError, match=r"has no engines of rtx") as caught:
        open_session(full, backend="rtx")
    assert (caught.value.code, caught.value.why) == ("E2001", "it has none")
    assert "--backend ort" in caught.value.fix


def test_an_unknown_backend_lists_the_known_ones(full: Bundle) -> None:
    with pytest.raises(
        UsageError, match=r"Unknown backend 'orx'(?s:.*)known: ort, rtx, torch, trt"
    ):
        open_session(full, backend="orx")


def test_names_are_those_of_the_exporter(subject: Subject) -> None:
    assert (RECORD, HOST_TENSORS) == (record.RECORD, record.HOST_TENSORS)
    assert NEWLINE == ops.IMAGE_NEWLINE
    files = {name: graph_record(subject.bundle, name)["file"] for name in (VISION, EMBED, DECODER)}
    assert files == {
        VISION: "vision_encoder.onnx",
        EMBED: "embed_tokens.onnx",
        DECODER: "decoder_model_merged_qdq_ort.onnx",
    }


def test_a_plugin_graph_is_for_engines_and_the_error_says_so(subject: Subject) -> None:
    with pytest.raises(UsageError, match="has no fp32 graph decoder_model_merged plugin") as caught:
        graph_record(subject.bundle, DECODER, lowering="plugin")
    assert caught.value.why == "plugins run in engines of TensorRT only"
    with pytest.raises(UsageError) as caught:
        graph_record(subject.bundle, DECODER, dtype="bf16", lowering="qdq")
    assert "decoder_model_merged_qdq_trt_fp16.onnx" in (caught.value.why or "")


def test_streamed_pieces_are_the_text(session: Session) -> None:
    options = Options(max_new_tokens=NEW_TOKENS)
    stream = session.stream(PROMPTS[0], pictures(1), options=options)
    assert "".join(token.text for token in stream) == stream.result().text


@pytest.mark.parametrize("group_size", [CHANNEL, 128])
def test_every_way_to_round_activations_gives_the_oracle_s_tokens(group_size: int) -> None:
    bundle = sample_bundle_of_rounded_activations(group_size)
    oracle = Oracle(fake_quant_model(QuantCheckpoint.open(bundle.checkpoint_folder)))
    asked = [prompt_of(each) for each in parity_samples(None, 6, oracle.model.processor)]
    wanted = [oracle.greedy(each, new_tokens=NEW_TOKENS) for each in asked]
    ways = [{"lowering": lowering} for lowering in lowerings_of(bundle)]
    assert len(ways) == (2 if group_size == CHANNEL else 1)
    for way in (*ways, {"backend": "torch:cpu"}):
        with open_session(bundle, threads=1, **way) as opened:
            answered = [
                opened.generate(Prepared(inputs=each), options=Options(max_new_tokens=NEW_TOKENS))
                for each in asked
            ]
        assert [list(answer.ids) for answer in answered] == wanted, way


def test_the_form_that_is_run_unless_one_is_named(subject: Subject) -> None:
    assert lowerings_of(subject.bundle) == ["qdq", "reference"]
    assert default_lowering(subject.bundle) == "qdq"
    groups = sample_bundle_of_rounded_activations(128)
    assert (lowerings_of(groups), default_lowering(groups)) == (["reference"], "reference")
    with open_session(groups, threads=1) as opened:
        assert opened.name == "ort:reference"
