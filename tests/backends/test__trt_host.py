"""An engine in a process of its own: what is checked before it starts, and every way in which it can end.

The children here hold `recorded_tensorrt`, a double; the processes, pipes and signals are real.
"""

import json
import signal
import sys
import time
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mbq_export.backends import _tensorrt, _trt_host
from mbq_export.backends._trt_flavour import FLAVOURS, Installed
from mbq_export.backends.base import TensorSpec
from mbq_export.errors import MbqError
from mbq_export.native import GRACE_S, LocalGpu
from mbq_export.runtime.kv_cache import DecoderPorts
from tests.backends import recorded_tensorrt as double

CARD = LocalGpu(name="GeForce RTX 4090", sm=89, driver="580.95")
TRT = Installed(flavour=FLAVOURS["trt"], module="tensorrt", version="10.16.1.11", library=None)


def spec(name: str, dtype: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    symbols = tuple(f"s{index}" if size < 0 else size for index, size in enumerate(shape))
    return asdict(TensorSpec(name=name, dtype=np.dtype(dtype).name, shape=symbols))


def engine_file(folder: Path, data: bytes = b"engine", **changes: object) -> Path:
    """An engine of the double with its record, at a bundle's depth."""
    place = folder / "engines" / "trt-10.16.1.11" / "sm89"
    place.mkdir(parents=True)
    path = place / "decoder.engine"
    path.write_bytes(data)
    names = list(double.INPUTS)
    entry = {
        "sha256": sha256(data).hexdigest(),
        "inputs": [spec(name, *double.INPUTS[name]) for name in names],
        "outputs": [spec(name, *each) for name, each in double.OUTPUTS.items()],
        "profiles": [{name: [double.LARGEST[name]] * 3 for name in names}],
        "plugin_layers_expected": {},
        "weight_streaming": False,
    }
    record = {"schema": 1, "flavour": "trt", "version": TRT.version, "sm": ["sm89"], "plugin": None}
    (place / "engine.json").write_text(
        json.dumps({**record, "engines": {"decoder": entry}, **changes})
    )
    return path


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the GPU and the TensorRT that the record names."""
    monkeypatch.setattr(_trt_host, "local_gpu", lambda: CARD)
    monkeypatch.setattr(_tensorrt, "installed_flavour", lambda _: TRT)


LOADING_S = 60.0
"""More than a busy machine takes to import numpy and answer."""
LIMIT_S = 0.5
"""Far more than the double takes to answer, far less than it hangs."""


def opened(
    path: Path, what: str = "works", *, timeout_s: float = LOADING_S
) -> _trt_host.HostedEngine:
    session = (sys.executable, "-m", "tests.backends.recorded_tensorrt", what)
    return _trt_host.open_hosted("trt", path, session=session, timeout_s=timeout_s)


def refusal(path: Path, what: str = "works") -> MbqError:
    with pytest.raises(MbqError) as error:
        opened(path, what)
    return error.value


def feeds(value: float, at: int, sequence: int = 1) -> dict[str, np.ndarray]:
    return {
        "inputs_embeds": np.full((1, 1, double.HIDDEN), value, np.float32),
        "position_ids": np.array([[at]]),
        "sequence": np.array([sequence]),
    }


def test_decoder_looks_like_one_that_keeps_its_cache(tmp_path: Path) -> None:
    with opened(engine_file(tmp_path)) as engine:
        ports = DecoderPorts.of(engine)
        assert ports.past == ()
        assert ports.sequence is not None
        assert [spec.name for spec in engine.outputs] == ["logits"]


def test_tokens_cross_and_the_cache_stays(tmp_path: Path) -> None:
    with opened(engine_file(tmp_path)) as engine:
        sums = [float(engine.run(feeds(1, at))["logits"][0, 0, 0]) for at in range(4)]
        assert sums == [4.0, 8.0, 12.0, 16.0]
        assert float(engine.run(feeds(3, 0, sequence=2))["logits"][0, 0, 0]) == 12.0


def test_failed_run_is_an_error_and_ends_the_child(tmp_path: Path) -> None:
    engine = opened(engine_file(tmp_path))
    with pytest.raises(MbqError, match="Position 16 does not continue 0") as error:
        engine.run(feeds(1, double.SLOTS))
    assert error.value.code == "E6009"
    engine.close()


def test_child_that_dies_names_the_signal(tmp_path: Path) -> None:
    engine = opened(engine_file(tmp_path), "die")
    with pytest.raises(MbqError, match="died of SIGSEGV") as error:
        engine.run(feeds(1, 0))
    assert (error.value.code, error.value.exit_status) == ("E6003", 6)
    engine.close()


def hanging(path: Path, what: str) -> _trt_host.HostedEngine:
    """An engine that loads as others do, and whose next call has little time."""
    engine = opened(path, what)
    engine._timeout_s = LIMIT_S
    return engine


def check_hang(error: MbqError, stage: str, started: float) -> None:
    assert (error.code, error.exit_status) == ("E5006", 5)
    assert error.message == f"TensorRT was still in {stage} after {LIMIT_S:g} s and was ended."
    assert error.why == f"the limit for one call of an engine is {LIMIT_S:g} s"
    assert error.fix[0] == "--engine-timeout 2"
    assert time.monotonic() - started < GRACE_S


@pytest.mark.parametrize(("what", "tokens"), [("hang", 1), ("never-reads", 50_000)])
def test_run_that_hangs_is_ended_with_its_child(tmp_path: Path, what: str, tokens: int) -> None:
    """One child never answers; the other never reads, so that even asking would take for ever."""
    engine = hanging(engine_file(tmp_path), what)
    child, folder = engine._child, Path(engine._folder.name)
    started = time.monotonic()
    asked = {**feeds(1, 0), "inputs_embeds": np.ones((1, tokens, double.HIDDEN), np.float32)}
    asked["position_ids"] = np.arange(tokens)[None]
    with pytest.raises(MbqError) as error:
        engine.run(asked)
    check_hang(error.value, "run", started)
    assert child._process.returncode == -signal.SIGKILL
    assert not folder.exists()
    engine.close()


def test_engine_that_never_loads_is_ended(tmp_path: Path) -> None:
    # The child must have begun to load before the limit, or another stage would be named.
    with pytest.raises(MbqError, match="was still in load after 8 s") as error:
        opened(engine_file(tmp_path), "never-loads", timeout_s=8)
    assert (error.value.code, error.value.exit_status) == ("E5006", 5)


def test_limit_is_of_each_call_and_not_of_all(tmp_path: Path) -> None:
    with hanging(engine_file(tmp_path), "works") as engine:
        for at in range(3):
            time.sleep(LIMIT_S / 2)
            assert float(engine.run(feeds(1, at))["logits"][0, 0, 0]) == 4.0 * (at + 1)


def test_too_little_memory_is_told_at_the_start(tmp_path: Path) -> None:
    error = refusal(engine_file(tmp_path), "memory")
    assert (error.code, error.exit_status) == ("E5005", 5)


def test_engine_that_tensorrt_refuses_all_the_same(tmp_path: Path) -> None:
    error = refusal(engine_file(tmp_path, b"something else"))
    assert (error.code, error.exit_status) == ("E6008", 6)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"flavour": "rtx"}, "E7006", "it is for rtx, this is trt"),
        ({"version": "10.3.0"}, "E7001", "it is for version 10.3.0, this is 10.16.1.11"),
        ({"sm": ["sm87"]}, "E7002", "it is for sm87, this GeForce RTX 4090 is sm89"),
    ],
)
def test_engine_for_another_machine_is_never_loaded(
    tmp_path: Path, changes: dict[str, object], code: str, words: str
) -> None:
    error = refusal(engine_file(tmp_path, **changes))
    assert (error.code, error.exit_status) == (code, 7)
    assert words in error.message
    assert error.fix[0] == "mbq-export build --model MODEL --target sm89:trt -o DIR"


def test_all_differences_are_told_at_once(tmp_path: Path) -> None:
    error = refusal(engine_file(tmp_path, flavour="rtx", version="1.7", sm=["sm120"]))
    assert len(error.context["differences"]) == 3


def test_old_driver_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = LocalGpu(name="RTX", sm=89, driver="550.1")
    rtx = Installed(flavour=FLAVOURS["rtx"], module="m", version="1", library=None)
    record = {"flavour": "rtx", "version": "1", "sm": ["sm89"]}
    with pytest.raises(MbqError, match="it needs driver 580 or newer, this is 550") as error:
        _trt_host.check_fits(tmp_path / "x.engine", record, rtx, old)
    assert error.value.code == "E7007"


def test_changed_engine_is_not_loaded(tmp_path: Path) -> None:
    path = engine_file(tmp_path)
    path.write_bytes(b"enginf")
    assert refusal(path).code == "E4602"


@pytest.mark.parametrize("gone", ["decoder.engine", "engine.json"])
def test_engine_without_its_record_is_none(tmp_path: Path, gone: str) -> None:
    path = engine_file(tmp_path)
    path.with_name(gone).unlink()
    assert refusal(path).code == "E4501"


def test_newer_record_is_not_guessed_at(tmp_path: Path) -> None:
    assert refusal(engine_file(tmp_path, schema=2)).code == "E7004"


def test_engine_with_plugins_wants_the_library_it_was_built_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MBQ_EXPORT_CACHE", str(tmp_path / "cache"))
    path = engine_file(tmp_path, plugin={"abi": 1, "sha256": "0" * 64})
    record = json.loads(path.with_name("engine.json").read_text())
    record["engines"]["decoder"]["plugin_layers_expected"] = {"W3Linear": 20}
    path.with_name("engine.json").write_text(json.dumps(record))
    error = refusal(path)
    assert (error.code, error.exit_status) == ("E3005", 3)


def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, gpu: bool = False) -> MbqError:
    """Refusal of a machine without the driver's tool, with or without a GPU."""
    for device, vendor in (("0000:00:01.0", "0x1234"), ("0000:00:02.0", "0x10de")):
        if gpu or vendor != _trt_host.NVIDIA:
            (tmp_path / "pci" / device).mkdir(parents=True)
            (tmp_path / "pci" / device / "vendor").write_text(f"{vendor}\n")
    monkeypatch.setattr(_trt_host, "PCI_DEVICES", tmp_path / "pci")
    monkeypatch.setattr(_trt_host, "local_gpu", lambda: None)
    return refusal(Path("decoder.engine"))


def test_engine_without_a_gpu_names_what_works_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = machine(tmp_path, monkeypatch)
    assert (error.code, error.exit_status) == ("E3001", 3)
    assert error.message == "decoder.engine cannot run: this machine has no NVIDIA GPU."
    assert _trt_host.RUNS_HERE in error.fix


def test_gpu_without_a_driver_is_another_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine(tmp_path, monkeypatch, gpu=True).code == "E3002"
