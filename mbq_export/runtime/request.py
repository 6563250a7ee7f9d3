"""One request on its way through three engines: pictures and a prompt in, tokens out.

    preprocess   prompt, pictures ──► ids, tiles                          host
    vision       tiles ──► features of every tile                         engine
    merge        ids ──► embeddings, rows at image tokens replaced        engine, host
    prefill      embeddings ──► logits of the last position, cache        engine
    sample       logits ──► token                                         host      ┐ once per
    decode       token ──► embedding ──► logits, cache                    engine    ┘ token

A request knows graphs only by their ports, so ONNX Runtime, the torch oracle and whatever comes next run
through the same lines. Batch 1.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mbq_export.backends.base import Engine
from mbq_export.errors import located
from mbq_export.families.base import VISION
from mbq_export.families.inputs import ModelInputs
from mbq_export.runtime.kv_cache import DecoderPorts, KvCache
from mbq_export.runtime.timing import Clock

if TYPE_CHECKING:
    from PIL.Image import Image


class Preprocessor(Protocol):
    """What a session needs of `families.inputs.Processor`."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a turn."""

    def inputs(
        self, prompt: str, images: "Sequence[Image]" = (), answer: str | None = None
    ) -> ModelInputs:
        """Build the inputs of one turn."""

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens left out."""


class Merge(Protocol):
    """Puts image features where the prompt has image tokens."""

    def __call__(
        self, embeds: NDArray[Any], features: NDArray[Any], inputs: ModelInputs
    ) -> NDArray[Any]:
        """Merge.

        Args:
            embeds: (T, hidden) embeddings of the prompt.
            features: (tiles, tokens per tile, hidden).
            inputs: The request.

        Returns:
            (T, hidden) with the rows at image tokens replaced.
        """


@dataclass(frozen=True, kw_only=True)
class Engines:
    """The three graphs of a model.

    Attributes:
        vision: (tiles, 3, h, w) to (tiles, tokens per tile, hidden).
        embed: (1, T) ids to (1, T, hidden).
        decoder: Embeddings and cache to logits and cache.
    """

    vision: Engine
    embed: Engine
    decoder: Engine

    def close(self) -> None:
        """Close all three."""
        for engine in (self.vision, self.embed, self.decoder):
            engine.close()


@dataclass(frozen=True, kw_only=True)
class Model:
    """Everything that answers a request.

    Attributes:
        engines: The graphs.
        preprocessor: Text and pictures to ids and tiles, and back.
        merge: Puts image features into the prompt's embeddings.
        limit: Positions that prompt and answer may use together.
    """

    engines: Engines
    preprocessor: Preprocessor
    merge: Merge
    limit: int

    @functools.cached_property
    def ports(self) -> DecoderPorts:
        """The decoder's inputs and outputs (E4413 if they are not a decoder's)."""
        return DecoderPorts.of(self.engines.decoder)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request as tokens and tiles.

    Attributes:
        inputs: As the model takes them.
        preprocess_ms: Time it took to make them; 0 if they were made elsewhere.
    """

    inputs: ModelInputs
    preprocess_ms: float = 0.0

    @property
    def visual_tokens(self) -> int:
        """Positions filled with image features."""
        return int((self.inputs.token_classes == VISION).sum())

    @property
    def prompt_tokens(self) -> int:
        """The other positions."""
        return int(self.inputs.input_ids.size) - self.visual_tokens


class Request:
    """One request on its way through the engines: its cache and its clock."""

    def __init__(self, model: Model, prepared: Prepared) -> None:
        self._model = model
        self._prepared = prepared
        self._cache = KvCache(ports=model.ports, limit=model.limit)
        self.clock = Clock(preprocess_ms=prepared.preprocess_ms)

    def check(self, new_tokens: int) -> None:
        """Refuse a request that has no room for its answer (E2009)."""
        self._cache.check(self._prepared.inputs.input_ids.size + new_tokens)

    def merged(self) -> NDArray[Any]:
        """Return (1, T, hidden) embeddings of the prompt with its pictures in place."""
        inputs = self._prepared.inputs
        features = None
        if inputs.pixel_values.shape[0]:
            with self.clock.lap("vision"):
                features = run_single(self._model.engines.vision, inputs.pixel_values)
        with self.clock.lap("merge"):
            embeds = self._embed(inputs.input_ids)
            if features is not None:
                embeds = self._model.merge(embeds[0], features, inputs)[None]
        return embeds

    def prefill(self) -> NDArray[np.float32]:
        """Run the prompt; return (V,) logits of its last position."""
        self.check(0)
        embeds = self.merged()
        with self.clock.lap("prefill"):
            logits = self.forward(embeds)
        return last(logits)

    def step(self, token: int) -> NDArray[np.float32]:
        """Run one more token; return (V,) logits."""
        with self.clock.lap("decode"):
            logits = self.forward(self._embed(np.array([token], np.int64)))
        return last(logits)

    def forward(self, embeds: NDArray[Any]) -> NDArray[np.float32]:
        """Run the decoder over (1, T, hidden) new positions; return (T or 1, V) logits."""
        with located("decoder"), located(f"position {self._cache.length}"):
            outputs = self._model.engines.decoder.run(self._cache.feeds(embeds))
        self._cache.take(outputs, embeds.shape[1])
        logits: NDArray[np.float32] = np.asarray(
            outputs[self._model.ports.logits.name][0], np.float32
        )
        return logits

    def _embed(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        return run_single(self._model.engines.embed, ids[None])


def last(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the (V,) logits of the last position."""
    row: NDArray[np.float32] = logits[-1]
    return row


def run_single(engine: Engine, value: NDArray[Any]) -> NDArray[Any]:
    """Run a graph of one input and one output."""
    return engine.run({engine.inputs[0].name: value})[engine.outputs[0].name]
