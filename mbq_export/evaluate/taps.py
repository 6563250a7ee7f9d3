"""Intermediate values of a decoder, under the same names whether a graph or a torch model computes them.

    inputs_embeds                 merged embeddings: what block 0 reads
    layers.i.<role>.in  .out      what a linear reads and returns, bias included, fused or not
    layers.i.hidden               residual stream behind block i
    norm.out                      what the head reads

In a graph they become further outputs. Only its small protobuf is changed: weights stay in the external data
files, which nobody reads or copies, so that INT4 constants remain what they are. In a torch model they are
caught by hooks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray
from torch import nn

from mbq_export.backends.base import Engine, TensorSpec
from mbq_export.errors import FormatError
from mbq_export.export.ops import INPUTS_EMBEDS, hidden_value, linear_input, linear_output
from mbq_export.families.base import ModelFamily

FINAL_NORM: Final = "norm.out"

Values = dict[str, NDArray[Any]]
"""Name -> (T, C) of one sample."""


def role_of(linear: str) -> str:
    """Last part of a module path, for example ``q_proj``."""
    return linear.rpartition(".")[2]


def linear_values(layer: int, linears: Sequence[str]) -> tuple[str, ...]:
    """Names of what the linears of one block read and return, in graph order, each once."""
    names = [
        name(layer, role_of(linear)) for linear in linears for name in (linear_input, linear_output)
    ]
    return tuple(dict.fromkeys(names))


def stream_values(layers: int) -> tuple[str, ...]:
    """Names along the residual stream: every block's output, and the final norm's."""
    return (*(hidden_value(layer) for layer in range(layers)), FINAL_NORM)


def tapped_graph(path: Path, values: Sequence[str]) -> bytes:
    """Serialize a graph with further outputs.

    Args:
        path: ONNX file; external data beside it stay there and keep their relative names.
        values: Names of values to return, behind the graph's own outputs.

    Raises:
        FormatError: E4407 if the graph has no value of one of these names.
    """
    graph = gs.import_onnx(onnx.load(path, load_external_data=False))
    tensors = graph.tensors()
    missing = [value for value in values if value not in tensors]
    if missing:
        raise FormatError(
            "E4407",
            f"{path.name} has no value {', '.join(missing[:5])}.",
            why="graphs name what every linear reads and returns, and the stream behind every block",
            fix="export the model again with this release",
        )
    graph.outputs += [tensors[value] for value in values]
    return bytes(gs.export_onnx(graph).SerializeToString())


class Recorder:
    """An engine that keeps what its last calls returned for some values, and returns the rest."""

    def __init__(self, engine: Engine, values: Sequence[str]) -> None:
        """Wrap an engine whose outputs include ``values``, (1, T, C) each."""
        self._engine = engine
        self._values = frozenset(values)
        self._parts: dict[str, list[NDArray[Any]]] = {}

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs of the engine."""
        return self._engine.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs of the engine without the recorded values."""
        return tuple(spec for spec in self._engine.outputs if spec.name not in self._values)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the engine, keep the recorded values and what it read, return the rest."""
        outputs = self._engine.run(feeds)
        for name in self._values:
            self._parts.setdefault(name, []).append(outputs.pop(name)[0])
        self._parts.setdefault(INPUTS_EMBEDS, []).append(feeds[INPUTS_EMBEDS][0])
        return outputs

    def take(self) -> Values:
        """Return what was recorded since the last call, (T, C) each; calls follow one another along T."""
        values = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        self._parts = {}
        return values

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()

    def __enter__(self) -> Self:
        """Return the recorder."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the engine."""
        self.close()


@contextmanager
def torch_values(module: nn.Module, family: ModelFamily, values: Sequence[str]) -> Iterator[Values]:
    """Catch values while a torch model runs one sample in one call.

    Args:
        module: A transformers model of the family.
        family: Gives the module paths.
        values: Names as in the module's docstring.

    Yields:
        A dictionary that holds (T, C) float arrays once the model has run.
    """
    caught: Values = {}
    wanted = set(values)
    blocks = module.get_submodule(family.blocks)
    with ExitStack() as hooks:

        def listen(path: str, *, reads: str = "", gives: str = "") -> None:
            target = module.get_submodule(path)
            if reads in wanted:
                hooks.enter_context(_removed(target.register_forward_pre_hook(_reading(reads))))
            if gives in wanted:
                hooks.enter_context(_removed(target.register_forward_hook(_giving(gives))))

        def _reading(name: str) -> Any:
            def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                caught[name] = _rows(args[0])

            return hook

        def _giving(name: str) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                caught[name] = _rows(output[0] if isinstance(output, tuple) else output)

            return hook

        for layer in range(len(list(blocks.children()))):
            listen(
                f"{family.blocks}.{layer}",
                reads=INPUTS_EMBEDS if layer == 0 else "",
                gives=hidden_value(layer),
            )
            for linear in family.linears:
                role = role_of(linear)
                listen(
                    family.linear_path(layer, linear),
                    reads=linear_input(layer, role),
                    gives=linear_output(layer, role),
                )
        listen(family.final_norm, gives=FINAL_NORM)
        yield caught


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _rows(value: torch.Tensor) -> NDArray[Any]:
    """The only sample of a batch, copied: models reuse buffers."""
    return value.detach()[0].float().cpu().numpy().copy()
