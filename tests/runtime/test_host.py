"""Which engines of a bundle a session takes, and answers over the double of `tests/backends/recorded_tensorrt.py`."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import numpy as np
import pytest

from mbq_export.backends import BACKENDS, _trt_host
from mbq_export.backends._table import TableEngine
from mbq_export.backends._trt_session import KeptDecoder
from mbq_export.backends.base import TensorSpec
from mbq_export.backends.ort import OrtEngine, open_graph
from mbq_export.bundle import Bundle
from mbq_export.errors import MbqError
from mbq_export.export.embed import embed_graph
from mbq_export.export.profile import OPSET23
from mbq_export.export.save import save_graph
from mbq_export.native import LocalGpu
from mbq_export.runtime import ISOLATED, host
from mbq_export.runtime.request import Engines, Model
from mbq_export.runtime.sampling import Options
from mbq_export.runtime.session import Session
from tests.backends import recorded_tensorrt as double
from tests.export import decoders
from tests.runtime import handmade
from tests.runtime.test_session import greedy

CARD = LocalGpu(name="GeForce RTX 4090", sm=89, driver="580.95")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """Records of three engine folders on a machine with an RTX 4090."""
    monkeypatch.setattr(host, "gpu_for", lambda _: CARD)
    for name, flavour, sms in (
        ("rtx-1.7/sm120", "rtx", ["sm120"]),
        ("rtx-1.7/sm86-sm89", "rtx", ["sm86", "sm89"]),
        ("trt-11.4/sm87", "trt", ["sm87"]),
    ):
        folder = tmp_path / "engines" / name
        folder.mkdir(parents=True)
        (folder / "engine.json").write_text(json.dumps({"flavour": flavour, "sm": sms}))
    return Bundle(root=tmp_path, manifest={}, sha256="")


def test_engines_for_this_gpu_are_chosen(bundle: Bundle) -> None:
    assert host.engine_folder(bundle, "rtx").name == "sm86-sm89"


def test_engines_for_another_gpu_are_left_to_the_check_that_tells_why(bundle: Bundle) -> None:
    assert host.engine_folder(bundle, "trt").name == "sm87"


def test_flavour_without_engines_lists_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(MbqError, match="has no engines of trt") as error:
        host.engine_folder(Bundle(root=tmp_path, manifest={}, sha256=""), "trt")
    assert error.value.code == "E2001"


def test_backends_with_engines_are_those_that_say_so() -> None:
    assert tuple(name for name, each in BACKENDS.members().items() if each.isolated) == ISOLATED


class Opened:
    """What stands for an engine's process: remembers its file and whether it was closed."""

    def __init__(self, path: Path) -> None:
        self.path, self.open = path, True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.open = False


def engines_in(folder: Path, *names: str, dtype: str = "float16") -> Path:
    """A folder of engines as recorded, without their files."""
    folder.mkdir()
    ports = {"inputs": [{"name": "x", "dtype": dtype}]}
    record = {"flavour": "rtx", "sm": ["sm89"], "engines": dict.fromkeys(names, ports)}
    (folder / "engine.json").write_text(json.dumps(record))
    return folder


def table_graph(folder: Path) -> Path:
    path = folder / "embed_tokens_fp16.onnx"
    profile = {"family": decoders.FAMILY, "dtype": "fp16", "profile": OPSET23}
    save_graph(embed_graph(decoders.checkpoint(), **profile), path)
    return path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Opened]:
    """Engines that were started, in order."""
    found: list[Opened] = []

    def start(_backend: str, path: Path, **_: object) -> Opened:
        found.append(Opened(path))
        return found[-1]

    monkeypatch.setattr(host, "open_hosted", start)
    return found


def test_embeddings_come_from_the_table_where_there_is_no_engine_of_it(
    tmp_path: Path, started: list[Opened]
) -> None:
    folder = engines_in(tmp_path / "sm89", "vision", "decoder")
    engines = host.hosted_engines(folder, "rtx", embed=table_graph(tmp_path))
    assert [each.path.name for each in started] == ["vision.engine", "decoder.engine"]
    assert isinstance(engines.embed, TableEngine)
    assert engines.embed.outputs[0].dtype == "float16"


def test_embedding_engine_of_the_bundle_is_the_one_that_answers(
    tmp_path: Path, started: list[Opened]
) -> None:
    folder = engines_in(tmp_path / "sm89", "vision", "decoder", "embed")
    engines = host.hosted_engines(folder, "rtx", embed=tmp_path / "never-read.onnx")
    assert engines.embed is started[-1]
    assert started[-1].path == folder / "embed.engine"
    assert all(each.open for each in started)


def test_engines_that_were_started_end_when_the_table_is_missing(
    tmp_path: Path, started: list[Opened]
) -> None:
    folder = engines_in(tmp_path / "sm89", "vision", "decoder")
    with pytest.raises(MbqError, match="There is no embedding graph"):
        host.hosted_engines(folder, "rtx", embed=tmp_path / "gone.onnx")
    assert [each.open for each in started] == [False, False]


@pytest.mark.parametrize(("dtype", "name"), [("float16", "fp16"), ("bfloat16", "bf16")])
def test_type_of_engines_is_that_of_the_decoders_embeddings(
    tmp_path: Path, dtype: str, name: str
) -> None:
    assert host.engine_dtype(engines_in(tmp_path / "sm89", "decoder", dtype=dtype)) == name


CHUNK = 5
"""Tokens of one run: the prompts below take several."""


class InProcess:
    """A decoder that keeps its cache on the double's device, without the process around it."""

    def __init__(self, decoder: OrtEngine, *, kv: str) -> None:
        static, slots = kv == "static", handmade.POSITIONS
        longest = slots if static else slots + CHUNK
        cache = (np.float32, (-1, 1, slots if static else -1, handmade.HIDDEN))
        inputs = {
            "inputs_embeds": (np.float32, (-1, -1, handmade.HIDDEN)),
            "attention_mask": (np.int64, (-1, slots if static else -1)),
            "position_ids": (np.int64, (-1, -1)),
            **({"write_indices": (np.int64, (-1,))} if static else {}),
            **{f"past_key_values.0.{part}": cache for part in ("key", "value")},
        }
        outputs = {
            "logits": (np.float32, (-1, 1, handmade.VOCAB)),
            **{f"present.0.{part}": cache for part in ("key", "value")},
        }

        def compute(at: Callable[[str], np.ndarray]) -> None:
            names = dict(zip(inputs, decoder.inputs, strict=True))
            found = decoder.run({spec.name: at(name).copy() for name, spec in names.items()})
            for name, spec in zip(outputs, decoder.outputs, strict=True):
                at(name).reshape(-1)[: found[spec.name].size] = found[spec.name].reshape(-1)

        sizes = {"inputs_embeds": (1, CHUNK, handmade.HIDDEN), "position_ids": (1, CHUNK)}
        sizes |= {"attention_mask": (1, longest), "write_indices": (1,)}
        sizes |= {"logits": (1, 1, handmade.VOCAB)}
        for name in (*inputs, *outputs):
            room = slots if name.startswith("past") else longest
            sizes.setdefault(name, (1, 1, room, handmade.HIDDEN))
        self.cuda = double.RecordedCuda()
        graph = double.Graph(inputs=inputs, outputs=outputs, largest=sizes, compute=compute)
        engine = double.decoder(self.cuda, graph=graph, aliases=static)
        self.run = KeptDecoder(
            engine=engine, slots=slots, chunk=CHUNK, logits="logits", width=handmade.VOCAB
        ).run
        specs = [
            tuple(
                TensorSpec(
                    name=name,
                    dtype=np.dtype(dtype).name,
                    shape=tuple("n" if size < 0 else size for size in shape),
                )
                for name, (dtype, shape) in ports.items()
            )
            for ports in (inputs, outputs)
        ]
        self.inputs, self.outputs = _trt_host.kept_ports(*specs)

    def close(self) -> None:
        """Nothing is held."""


@pytest.fixture(params=["static", "concat"])
def session(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Session]:
    """A session whose decoder is the handmade one, run by the double as an engine that keeps its cache."""
    plain = handmade.model(tmp_path, kv=request.param, logits="last")
    path = handmade.decoder(
        handmade.weights(), tmp_path / "d.onnx", kv=request.param, logits="last"
    )
    decoder = InProcess(open_graph(path, threads=1), kv=request.param)
    engines = Engines(vision=plain.engines.vision, embed=plain.engines.embed, decoder=decoder)
    model = Model(
        engines=engines, preprocessor=handmade.Bytes(), merge=handmade.merge, limit=plain.limit
    )
    with Session(model) as opened:
        yield opened


def test_answers_over_a_kept_cache_are_those_of_the_model_without_one(
    session: Session, request: pytest.FixtureRequest
) -> None:
    for prompt in ("a", "what is it", "zebra"):
        found = session.generate(prompt, options=Options(max_new_tokens=20, ignore_end=True))
        assert list(found.ids) == greedy(prompt, 20)
    calls = session.model.engines.decoder.cuda.calls
    replayed = calls.count("cuGraphLaunch") > calls.count("execute_async_v3")
    assert replayed == (request.node.callspec.params["session"] == "static")


def test_forced_tokens_give_the_logits_of_every_position(session: Session) -> None:
    inputs = handmade.Bytes().inputs("colour", [np.ones(handmade.TILE)], answer="red")
    w = handmade.weights()
    expected = handmade.reference_logits(w, handmade.reference_embeds(w, inputs))
    np.testing.assert_allclose(session.teacher_forced(inputs), expected, rtol=1e-4, atol=1e-4)
