"""The child that holds one engine: loads it, keeps its buffers and its cache on the device, answers runs until its end.

    python -P -X faulthandler -m mbq_export.backends._trt_session job.json

Reads messages (`_trt_channel`) from standard input and answers on what was standard output; anything a library prints
goes to the log instead. A decoder keeps its cache, and only embeddings, positions and logits cross. Input and output of a
static cache are one buffer; a decode step, whose shapes repeat, is then recorded once and replayed. Those of a cache that
grows change places after each run.

Not one line of this has met a GPU with TensorRT: it is held to the documented API by a recorded-call double.
"""

import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from mbq_export.backends import _trt_versions
from mbq_export.backends._trt_channel import Closed, receive, send
from mbq_export.backends._trt_cuda import Cuda
from mbq_export.backends._trt_job import Job, Refused
from mbq_export.backends._trt_kept import POSITIONS, WRITE, KeptDecoder
from mbq_export.backends._trt_plugins import load_plugins
from mbq_export.backends._trt_worker import loaded, stage

PAST: Final = "past_key_values."
PRESENT: Final = "present."


@dataclass(kw_only=True)
class Buffer:
    """A tensor of an engine on the device: room for its largest shape."""

    name: str
    dtype: np.dtype[Any]
    address: int
    size: int
    is_input: bool


@dataclass(kw_only=True)
class LoadedEngine:
    """An engine, its context and its buffers.

    Attributes:
        trt: The imported module.
        cuda: The device.
        engine: What was deserialised.
        context: What runs it.
        largest: Largest shape of every input and output.
        buffers: By tensor name, in the engine's order.
        recorded: Recorded graph by the shapes it was recorded with; 0 where recording failed.
        seen: Shapes that were run before: recording begins with the second run, when all is warm.
    """

    trt: Any
    cuda: Cuda
    engine: Any
    context: Any
    largest: Mapping[str, tuple[int, ...]]
    buffers: dict[str, Buffer] = field(default_factory=dict)
    recorded: dict[tuple[Any, ...], int] = field(default_factory=dict)
    seen: set[tuple[Any, ...]] = field(default_factory=set)

    def bind(self) -> None:
        """Allocate a buffer per tensor, one for an input and an output of a static cache, and tell the context.

        Buffers of a cache that grows change places after each run, so both have room for what comes out.

        Raises:
            Refused: ``gpu-memory`` if they do not fit, ``trt-run`` if the context refuses an address.
        """
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        for name in names:
            alias = self._alias(name, names)
            dtype = _trt_versions.array_type(self.trt, self.engine.get_tensor_dtype(name))
            roomy = name if WRITE in names else name.replace(PAST, PRESENT, 1)
            shape = self.largest.get(roomy, tuple(self.engine.get_tensor_shape(name)))
            size = math.prod(abs(each) for each in shape) * dtype.itemsize
            address = self.buffers[alias].address if alias else self.cuda.allocate(size)
            is_input = self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT
            self.buffers[name] = Buffer(
                name=name, dtype=dtype, address=address, size=size, is_input=is_input
            )
            if not self.context.set_tensor_address(name, address):
                raise Refused("trt-run", f"The context refuses an address for {name}.")

    def _alias(self, name: str, names: list[str]) -> str | None:
        """Input whose buffer an output writes into: as the engine says, or a static cache by its name."""
        if self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT:
            return None
        told = _trt_versions.aliased_input(self.engine, name)
        named = name.replace(PRESENT, PAST, 1) if name.startswith(PRESENT) else None
        return told or (named if named in names and WRITE in names else None)

    @property
    def caches(self) -> list[Buffer]:
        """Cache inputs."""
        return [each for name, each in self.buffers.items() if name.startswith(PAST)]

    @property
    def grows(self) -> bool:
        """Whether the cache gets longer with each run, instead of being written in place."""
        return bool(self.caches) and WRITE not in self.buffers

    def forget(self) -> None:
        """Empty the cache; what is in it may be no number, and a weight of 0 does not hide that."""
        kept = [each for each in self.buffers.values() if each.name.startswith((PAST, PRESENT))]
        for address, size in {each.address: each.size for each in kept}.items():
            self.cuda.zero(address, size)

    def run(
        self,
        feeds: Mapping[str, NDArray[Any]],
        wanted: Mapping[str, tuple[int, ...]],
        *,
        past: int = 0,
    ) -> dict[str, NDArray[Any]]:
        """Run once.

        Args:
            feeds: One array per input but the caches, of the engine's types.
            wanted: Shape of every output to copy back.
            past: Positions in a cache that grows.

        Raises:
            Refused: ``trt-run`` if the engine refuses a shape or fails, ``gpu-error`` if the device does.
        """
        self._set_shapes({name: feeds[name].shape for name in feeds} | self._cache_shapes(past))
        held = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        for name, array in held.items():
            self.cuda.upload(self.buffers[name].address, array.ctypes.data, array.nbytes)
        if self.grows:
            self._execute()  # no shape comes twice in a sequence, and addresses change
        else:
            self._enqueue(tuple((name, array.shape) for name, array in sorted(held.items())))
        outputs = {name: np.empty(s, self.buffers[name].dtype) for name, s in wanted.items()}
        for name, array in outputs.items():
            self.cuda.download(array.ctypes.data, self.buffers[name].address, array.nbytes)
        self.cuda.wait()
        if self.grows:
            self._swap()
        return outputs

    def _cache_shapes(self, past: int) -> dict[str, tuple[int, ...]]:
        """(1, heads, positions, width) of every cache input."""
        shapes: dict[str, tuple[int, ...]] = {}
        for each in self.caches:
            _, heads, slots, width = tuple(self.engine.get_tensor_shape(each.name))
            shapes[each.name] = (1, heads, past if self.grows else slots, width)
        return shapes

    def _swap(self) -> None:
        """What came out is what goes in next."""
        for read in self.caches:
            written = self.buffers[read.name.replace(PAST, PRESENT, 1)]
            read.address, written.address = written.address, read.address
            for each in (read, written):
                if not self.context.set_tensor_address(each.name, each.address):
                    raise Refused("trt-run", f"The context refuses an address for {each.name}.")

    def _set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            if not self.context.set_input_shape(name, shape):
                raise Refused(
                    "trt-run",
                    f"The engine refuses shape {list(shape)} of {name}.",
                    (f"its profile goes to {list(self.largest.get(name, ()))}",),
                )

    def _enqueue(self, shapes: tuple[Any, ...]) -> None:
        """Run the context, or replay what was recorded for these shapes."""
        if self.recorded.get(shapes):
            self.cuda.launch(self.recorded[shapes])
            return
        if shapes in self.seen and shapes not in self.recorded:
            self.cuda.begin_capture()
            self._execute()
            self.recorded[shapes] = self.cuda.end_capture()
            if self.recorded[shapes]:
                self.cuda.launch(self.recorded[shapes])
                return
        self.seen.add(shapes)
        self._execute()

    def _execute(self) -> None:
        if not self.context.execute_async_v3(self.cuda.stream):
            raise Refused("trt-run", "TensorRT failed to run the engine.")


def load_engine(trt: Any, job: Job, cuda: Cuda) -> LoadedEngine:
    """Deserialise the engine of a job.

    Raises:
        Refused: ``plugin-load`` or ``plugin-creator`` for its plugins, ``trt-load`` if TensorRT refuses it.
    """
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    load_plugins(runtime.get_plugin_registry(), job)
    stage("deserialize")
    engine = runtime.deserialize_cuda_engine(Path(job.onnx).read_bytes())
    if engine is None:
        raise Refused(
            "trt-load", "TensorRT refused the engine, although all that is recorded fits."
        )
    if "WEIGHT_STREAMING" in job.flags:
        _trt_versions.set_streaming_budget(engine, engine.get_weight_streaming_automatic_budget())
    context = engine.create_execution_context()
    if context is None:
        raise Refused("gpu-memory", "TensorRT made no context for the engine.")
    loaded_engine = LoadedEngine(
        trt=trt, cuda=cuda, engine=engine, context=context, largest=largest_shapes(job)
    )
    loaded_engine.bind()
    return loaded_engine


def largest_shapes(job: Job) -> dict[str, tuple[int, ...]]:
    """Largest shape of every input, from the profile, and of every output, whose symbols the inputs have."""
    inputs = {name: tuple(shapes[-1]) for name, shapes in job.profile.items()}
    outputs = resolved({name: job.shapes[name] for name in job.outputs}, job.shapes, inputs)
    return inputs | outputs


def resolved(
    wanted: Mapping[str, list[Any]],
    symbols: Mapping[str, list[Any]],
    found: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[int, ...]]:
    """Replace the symbols in shapes.

    Args:
        wanted: Shapes with symbols for sizes that vary.
        symbols: The inputs' shapes, with the same symbols.
        found: The inputs' shapes as numbers.
    """
    sizes = {
        symbol: size
        for name, shape in found.items()
        for symbol, size in zip(symbols[name], shape, strict=True)
    }
    return {
        name: tuple(sizes[each] if isinstance(each, str) else each for each in shape)
        for name, shape in wanted.items()
    }


def runner_of(engine: LoadedEngine, job: Job) -> Callable[..., Any]:
    """What answers ``run``: a decoder that keeps its cache, or the engine as it is.

    Args:
        engine: The engine.
        job: Has the shape of every input and output, sizes that vary as symbols.
    """
    outputs = {name: job.shapes[name] for name in job.outputs}
    if engine.caches:
        logits = next(name for name in outputs if not name.startswith(PRESENT))
        # The mask of a cache that grows is longer by the tokens of a whole run.
        slots = engine.largest[engine.caches[0].name][2]
        return KeptDecoder(
            engine=engine,
            slots=slots,
            chunk=engine.largest[POSITIONS][1],
            logits=logits,
            width=int(outputs[logits][-1]),
        ).run

    def run(feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        given = {name: array.shape for name, array in feeds.items()}
        return engine.run(feeds, resolved(outputs, job.shapes, given))

    return run


def serve(run: Callable[..., Any], source: Any, answers: Any) -> None:
    """Answer runs until the other side closes."""
    while True:
        try:
            _, feeds = receive(source)
        except Closed:
            return
        try:
            outputs, head = run(feeds), {"kind": ""}
        except Refused as refused:
            outputs, head = {}, {"kind": refused.kind, "message": refused.message}
        send(answers, head, outputs)


def main(argv: list[str]) -> NoReturn:
    """Load an engine, say so, and answer until the parent closes the pipe."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    job = Job.read(Path(argv[1]))
    try:
        stage("load")
        trt = loaded(job)
        engine = load_engine(trt, job, Cuda())
        run = runner_of(engine, job)
    except Refused as refused:
        details = list(refused.details)
        send(answers, {"kind": refused.kind, "message": refused.message, "details": details}, {})
    else:
        stage("run")
        send(answers, {"kind": ""}, {})
        serve(run, sys.stdin.buffer, answers)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv)
