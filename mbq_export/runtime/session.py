"""A model that answers: one request after the other, batch 1.

text, pictures ── prepare ──► Prepared ── stream ──► Token, Token, ... ── result ──► Generation
ModelInputs ── teacher_forced ──► logits of every position
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

import numpy as np

from mbq_export.runtime.request import Model, Prepared, Request
from mbq_export.runtime.sampling import Options, check_finite
from mbq_export.runtime.stream import Generation, Stream
from mbq_export.runtime.timing import NS_PER_MS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image

    from mbq_export.families.inputs import ModelInputs


class Session:
    """A model that answers.

    Attributes:
        model: Engines, processor and limits.
        name: What reports call it, for example ``ort:qdq``.
    """

    def __init__(self, model: Model, *, name: str = "session") -> None:
        """Take over a model, to be closed with the session.

        Raises:
            FormatError: E4413 if its decoder is none.
        """
        self.model = model
        self.name = name
        self._ports = model.ports

    def prepare(
        self, prompt: str, images: Sequence[Image] = (), answer: str | None = None
    ) -> Prepared:
        """Turn text and pictures into tokens and tiles.

        Raises:
            FormatError: E42xx, E43xx from the processor.
        """
        start = time.perf_counter_ns()
        inputs = self.model.preprocessor.inputs(prompt, images, answer)
        spent = (time.perf_counter_ns() - start) / NS_PER_MS
        return Prepared(inputs=inputs, preprocess_ms=spent)

    def prefill(self, prepared: Prepared) -> NDArray[np.float32]:
        """Run everything up to the first logits.

        Returns:
            (V,) logits of the last position.

        Raises:
            UsageError: E2009 if the prompt is longer than the limit.
            GateError: E1103 if a logit is not finite.
        """
        logits = Request(self.model, prepared).prefill()
        check_finite(logits)
        return logits

    def stream(
        self,
        prompt: str | Prepared,
        images: Sequence[Image] = (),
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
            FormatError: E42xx, E43xx from the processor.
        """
        prepared = self.prepare(prompt, images) if isinstance(prompt, str) else prompt
        return Stream(self.model, prepared, options or Options())

    def generate(
        self,
        prompt: str | Prepared,
        images: Sequence[Image] = (),
        *,
        options: Options | None = None,
    ) -> Generation:
        """Answer in one go; arguments and errors as of `stream`, and E1103 for logits that are not finite."""
        return self.stream(prompt, images, options=options).result()

    def teacher_forced(self, inputs: ModelInputs) -> NDArray[np.float32]:
        """Return the logits at every position of given tokens, those of the answer included.

        One call if the graph gives all logits. A graph that gives the last position's only is called
        once per token, through its cache.

        Returns:
            (T, V): row t is the prediction for token t + 1. May hold NaN, which is for callers to judge.

        Raises:
            UsageError: E2009 if the sample is longer than the limit.
        """
        request = Request(self.model, Prepared(inputs=inputs))
        embeds = request.merged()
        width = 1 if self._ports.logits.shape[1] == 1 else embeds.shape[1]
        rows = [
            request.forward(embeds[:, start : start + width])
            for start in range(0, embeds.shape[1], width)
        ]
        return np.concatenate(rows)

    def close(self) -> None:
        """Free the engines. Closing twice is allowed."""
        self.model.engines.close()

    def __enter__(self) -> Self:
        """Return the session."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the session."""
        self.close()
