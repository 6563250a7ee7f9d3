"""One request after the other through three engines: pictures and a prompt in, tokens out.

    preprocess   prompt, pictures ──► ids, tiles                          host
    vision       tiles ──► features of every tile                         engine
    merge        ids ──► embeddings, rows at image tokens replaced        engine, host
    prefill      embeddings ──► logits of the last position, cache        engine
    sample       logits ──► token                                         host      ┐ once per
    decode       token ──► embedding ──► logits, cache                    engine    ┘ token

The session knows graphs only by their ports, so ONNX Runtime, the torch oracle and whatever comes next
run through the same lines. Batch 1.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from mbq_export.backends.base import Engine
from mbq_export.families.inputs import ModelInputs
from mbq_export.runtime.sampling import Options

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

Merge = Callable[[NDArray[Any], ModelInputs], NDArray[Any]]
"""(tiles, tokens, hidden) features of one request to (image tokens, hidden) rows."""


class Preprocessor(Protocol):
    """What a session needs of `families.inputs.Processor`."""

    @property
    def image_token_id(self) -> int:
        """Id of the token that stands for one row of image features."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a turn."""

    def inputs(
        self, prompt: str, images: Sequence["Image"] = (), answer: str | None = None
    ) -> ModelInputs:
        """Build the inputs of one turn."""

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens left out."""


@dataclass(frozen=True, kw_only=True)
class Engines:
    """The three graphs of a model.

    Attributes:
        vision: Tiles to features.
        embed: Token ids to embeddings.
        decoder: Embeddings and cache to logits and cache.
    """

    vision: Engine
    embed: Engine
    decoder: Engine

    def close(self) -> None:
        """Close all three."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request with its tokens and tiles.

    Attributes:
        inputs: As the model takes them.
        preprocess_ms: Time it took to make them; 0 if they were made elsewhere.
    """

    inputs: ModelInputs
    preprocess_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One generated token.

    Attributes:
        id: Its id.
        text: Text that became certain with it; empty while a character or a stop string is unfinished.
    """

    id: int
    text: str


@dataclass(frozen=True, kw_only=True)
class RequestStatistics:
    """What one request cost, by the clock around the real calls.

    Attributes:
        visual_tokens: Positions filled with image features.
        prompt_tokens: The other positions of the prompt.
        output_tokens: Tokens generated, the end token included.
        preprocess_ms: Pictures and text to tiles and ids.
        vision_ms: Vision engine over all tiles; 0 without pictures.
        merge_ms: Prompt ids to embeddings with image rows in place.
        prefill_ms: Merged embeddings to first logits.
        decode_ms: Per later token: embedding and decoder.
        sample_ms: Per token: logits to id.
        ttft_ms: Request in to first token out.
        e2e_ms: Request in to last token out.
        peak_rss_bytes: Largest resident memory of the process so far; None where the system does not tell.
    """

    visual_tokens: int
    prompt_tokens: int
    output_tokens: int
    preprocess_ms: float
    vision_ms: float
    merge_ms: float
    prefill_ms: float
    decode_ms: tuple[float, ...]
    sample_ms: tuple[float, ...]
    ttft_ms: float
    e2e_ms: float
    peak_rss_bytes: int | None

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token behind the first; None for a single token."""
        raise NotImplementedError

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens behind the first per second of decoding; None for a single token."""
        raise NotImplementedError

    def line(self) -> str:
        """Return the one line that ``run`` prints."""
        raise NotImplementedError

    def as_json(self) -> dict[str, Any]:
        """Return the JSON form; a value that does not exist is null with its reason."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished answer.

    Attributes:
        ids: Generated tokens, the end token included.
        text: Their text up to a stop string, special tokens left out.
        reason: Why it ended: ``end`` (end token), ``stop`` (stop string) or ``length``.
        collapsed: How the text repeats itself (W1105), or an empty string.
        statistics: What it cost.
    """

    ids: tuple[int, ...]
    text: str
    reason: str
    collapsed: str
    statistics: RequestStatistics


class Stream:
    """An answer in the making: iterate over its tokens, then ask for the `Generation`."""

    def __iter__(self) -> Iterator[Token]:
        """Generate until an end token, a stop string, or the most tokens wanted."""
        raise NotImplementedError

    def result(self) -> Generation:
        """Return the finished answer, generating what has not been asked for yet."""
        raise NotImplementedError


class Session:
    """A model that answers.

    Attributes:
        name: What reports call it, for example ``ort:qdq``.
        limit: Positions that prompt and answer may use together.
    """

    def __init__(
        self,
        *,
        engines: Engines,
        preprocessor: Preprocessor,
        merge: Merge,
        limit: int,
        name: str = "session",
    ) -> None:
        raise NotImplementedError

    def prepare(
        self, prompt: str, images: Sequence["Image"] = (), answer: str | None = None
    ) -> Prepared:
        """Turn text and pictures into tokens and tiles.

        Raises:
            FormatError: E42xx, E43xx from the processor.
        """
        raise NotImplementedError

    def prefill(self, prepared: Prepared) -> NDArray[np.float32]:
        """Run everything up to the first logits.

        Returns:
            (V,) logits of the last position.

        Raises:
            UsageError: E2009 if the prompt is longer than the limit.
            GateError: E1103 if a logit is not finite.
        """
        raise NotImplementedError

    def stream(
        self,
        prompt: "str | Prepared",
        images: Sequence["Image"] = (),
        *,
        options: Options | None = None,
    ) -> Stream:
        """Start an answer.

        Args:
            prompt: The user's text, or a request that is prepared already.
            images: Pictures, before the text.
            options: How to generate; greedy by default.

        Raises:
            UsageError: E2009 if prompt and new tokens exceed the limit; nothing has run then.
        """
        raise NotImplementedError

    def generate(
        self,
        prompt: "str | Prepared",
        images: Sequence["Image"] = (),
        *,
        options: Options | None = None,
    ) -> Generation:
        """Answer in one go; arguments and errors as of `stream`."""
        raise NotImplementedError

    def teacher_forced(self, inputs: ModelInputs) -> NDArray[np.float32]:
        """Return the logits at every position of given tokens, those of the answer included.

        One call if the graph gives all logits. A graph that gives the last position's only is called
        once per token, through its cache.

        Returns:
            (T, V): row t is the prediction for token t + 1.

        Raises:
            UsageError: E2009 if the sample is longer than the limit.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Free the engines. Closing twice is allowed."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Return the session."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the session."""
        self.close()
