"""What the child does with an engine, against a double that records the calls: slots, mask, cache, replay."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mbq_export.backends._trt_job import Job, Refused
from mbq_export.backends._trt_session import (
    LoadedEngine,
    largest_shapes,
    runner_of,
)
from mbq_export.tensor_file import BFLOAT16
from tests.backends import recorded_tensorrt as double

CALLED = {
    "ICudaEngine": double.Engine,
    "IExecutionContext": double.Context,
    "Runtime": double.Runtime,
}


@pytest.fixture
def cuda() -> double.RecordedCuda:
    return double.RecordedCuda()


@pytest.mark.parametrize("aliases", [True, False], ids=["told by the engine", "told by its name"])
def test_cache_input_and_output_share_one_address(cuda: double.RecordedCuda, aliases: bool) -> None:
    engine = double.decoder(cuda, aliases=aliases)
    addresses = engine.context.addresses
    assert addresses["present.0.key"] == addresses["past_key_values.0.key"]
    assert len(set(addresses.values())) == len(addresses) - 1
    assert cuda.calls.count("cuMemAlloc_v2") == len(addresses) - 1


def test_buffers_hold_the_largest_shapes_and_begin_as_zeros(cuda: double.RecordedCuda) -> None:
    engine = double.decoder(cuda)
    assert engine.buffers["inputs_embeds"].size == double.CHUNK * double.HIDDEN * 2
    for buffer in engine.caches:
        assert cuda.memory[buffer.address].raw == bytes(buffer.size)


def test_answers_are_sums_over_all_tokens_so_far(cuda: double.RecordedCuda) -> None:
    decoder = double.kept(double.decoder(cuda))
    assert double.step(decoder, [1, 2], at=0) == [12.0, 1.0]
    assert double.step(decoder, [5], at=2) == [32.0, 2.0]
    assert double.step(decoder, [7], at=3) == [60.0, 3.0]


def test_prompt_longer_than_a_run_is_fed_in_parts(cuda: double.RecordedCuda) -> None:
    decoder = double.kept(double.decoder(cuda))
    assert double.step(decoder, [1, 2, 3, 4, 5, 6, 7], at=0) == [4 * 28.0, 6.0]
    assert cuda.calls.count("execute_async_v3") == 3


def test_new_sequence_begins_with_an_empty_cache(cuda: double.RecordedCuda) -> None:
    decoder = double.kept(double.decoder(cuda))
    double.step(decoder, [100, 100, 100], at=0, sequence=1)
    assert double.step(decoder, [1], at=0, sequence=2) == [4.0, 0.0]
    (cache,) = decoder.engine.caches
    left = np.frombuffer(cuda.memory[cache.address].raw, np.float16)
    assert left.sum() == double.HIDDEN


def test_step_is_recorded_once_and_replayed(cuda: double.RecordedCuda) -> None:
    decoder = double.kept(double.decoder(cuda))
    sums = [double.step(decoder, [1], at=position)[0] for position in range(6)]
    assert sums == [4.0, 8.0, 12.0, 16.0, 20.0, 24.0]
    assert cuda.calls.count("execute_async_v3") == 2, "once for real, once while recording"
    assert cuda.calls.count("cuGraphLaunch") == 5


def test_engine_that_cannot_be_recorded_runs_every_time(cuda: double.RecordedCuda) -> None:
    cuda.fails["cuGraphInstantiateWithFlags"] = 801
    decoder = double.kept(double.decoder(cuda))
    assert [double.step(decoder, [1], at=position)[0] for position in range(4)] == [
        4.0,
        8.0,
        12.0,
        16.0,
    ]
    assert cuda.calls.count("cuStreamBeginCapture_v2") == 1


def test_position_beyond_the_cache_is_refused_before_tensorrt_drops_it(
    cuda: double.RecordedCuda,
) -> None:
    decoder = double.kept(double.decoder(cuda))
    double.step(decoder, [1] * double.SLOTS, at=0)
    ran = cuda.calls.count("execute_async_v3")
    with pytest.raises(Refused, match="Position 17 is beyond 16 slots") as error:
        double.step(decoder, [1], at=16)
    assert error.value.kind == "trt-run"
    assert cuda.calls.count("execute_async_v3") == ran


def test_tokens_that_do_not_continue_the_cache_are_refused(cuda: double.RecordedCuda) -> None:
    decoder = double.kept(double.decoder(cuda))
    double.step(decoder, [1, 2], at=0, sequence=1)
    with pytest.raises(Refused, match="Position 4 does not continue 2"):
        double.step(decoder, [1], at=4, sequence=1)
    double.step(decoder, [1], at=0, sequence=2)
    with pytest.raises(Refused, match="Position 2 does not continue 0"):
        double.step(decoder, [1], at=2, sequence=1)


def test_shape_beyond_the_profile_names_input_and_profile(cuda: double.RecordedCuda) -> None:
    engine = double.decoder(cuda)
    with pytest.raises(Refused, match=r"refuses shape \[1, 4, 4\] of inputs_embeds") as error:
        engine.run({"inputs_embeds": np.zeros((1, 4, 4), np.float16)}, {})
    assert error.value.details == ("its profile goes to [1, 3, 4]",)


@pytest.mark.parametrize(("status", "kind"), [(2, "gpu-memory"), (700, "gpu-error")])
def test_error_of_the_driver_keeps_its_number(
    cuda: double.RecordedCuda, status: int, kind: str
) -> None:
    cuda.fails["cuMemAlloc_v2"] = status
    with pytest.raises(Refused, match=f"cuMemAlloc_v2 returned CUDA error {status}") as error:
        double.decoder(cuda)
    assert error.value.kind == kind


@pytest.mark.trt
def test_double_has_no_name_that_the_bindings_lack() -> None:
    """The lean bindings have the same runtime classes as full TensorRT; they are imported in a child."""
    if importlib.util.find_spec("tensorrt_lean_bindings") is None:
        pytest.skip("tensorrt-lean bindings are not installed")
    code = "import tensorrt_lean_bindings as t\n"
    for real, mine in CALLED.items():
        names = sorted(
            n for n in vars(mine) if not n.startswith("_") and n not in {"aliases", "graph"}
        )
        code += f"for name in {names}: assert hasattr(t.{real}, name), name\n"
    code += "assert t.TensorIOMode.INPUT and t.nptype and t.Logger.WARNING\n"
    code += "try: t.nptype(t.DataType.BF16)\nexcept TypeError: pass\nelse: raise AssertionError\n"
    code += "import os; os._exit(0)\n"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr


def embedding(cuda: double.RecordedCuda, dtype: type) -> tuple[LoadedEngine, Job]:
    """An engine of one Gather over (5, 4) rows, as the child loads it, and its job."""
    rows = np.arange(20).reshape(5, 4).astype(dtype)

    def look_up(at: Callable[[str], np.ndarray]) -> None:
        ids = at("input_ids")
        at("inputs_embeds")[: ids.shape[0], : ids.shape[1]] = rows[ids]

    graph = double.Graph(
        inputs={"input_ids": (np.int64, (1, -1))},
        outputs={"inputs_embeds": (dtype, (1, -1, 4))},
        largest={"input_ids": (1, 6), "inputs_embeds": (1, 6, 4)},
        compute=look_up,
    )
    job = Job(
        op="session",
        workdir=Path(),
        flavour="rtx",
        module="",
        link="",
        library="",
        outputs=("inputs_embeds",),
        shapes={"input_ids": ["b", "s"], "inputs_embeds": ["b", "s", 4]},
        profile={"input_ids": ((1, 1), (1, 1), (1, 6))},
    )
    return double.decoder(cuda, graph=graph), job


def test_outputs_have_room_for_the_largest_inputs(cuda: double.RecordedCuda) -> None:
    """Sizes that vary are -1 to the engine: a buffer for one row each would be overrun by the second."""
    _, job = embedding(cuda, np.float16)
    assert largest_shapes(job) == {"input_ids": (1, 6), "inputs_embeds": (1, 6, 4)}


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16.type])
def test_engine_without_a_cache_answers_in_the_shape_that_its_inputs_give(
    cuda: double.RecordedCuda, dtype: type
) -> None:
    engine, job = embedding(cuda, dtype)
    (rows,) = runner_of(engine, job)({"input_ids": np.array([[4, 0, 1]])}).values()
    assert (rows.dtype, rows.shape) == (np.dtype(dtype), (1, 3, 4))
    assert rows[0, :, 0].astype(int).tolist() == [16, 0, 4]


def test_bfloat16_decoder_keeps_its_cache_in_bfloat16(cuda: double.RecordedCuda) -> None:
    """257 is a number of fp16 and none of bfloat16, where it becomes 256."""
    swap = {
        name: (BFLOAT16.type if dtype is np.float16 else dtype, shape)
        for name, (dtype, shape) in {**double.INPUTS, **double.OUTPUTS}.items()
    }
    graph = double.Graph(
        inputs={name: swap[name] for name in double.INPUTS},
        outputs={name: swap[name] for name in double.OUTPUTS},
        largest=double.LARGEST,
        compute=double.add_up,
    )
    decoder = double.kept(double.decoder(cuda, graph=graph))
    embeds = np.full((1, 1, double.HIDDEN), 257.0).astype(BFLOAT16)
    feeds = {"inputs_embeds": embeds, "position_ids": np.array([[0]])}
    (logits,) = decoder.run({**feeds, "sequence": np.array([1])}).values()
    assert logits.dtype == BFLOAT16
    assert float(logits[0, 0, 0]) == 4 * 256.0
    (cache,) = decoder.engine.caches
    assert cache.dtype == BFLOAT16
    assert cache.size == double.SLOTS * double.HIDDEN * BFLOAT16.itemsize
