"""An answer in the making: tokens one by one, then what became of them."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from mbq_export.errors import located
from mbq_export.runtime.request import Model, Prepared, Request
from mbq_export.runtime.sampling import Options, Sampler, collapse
from mbq_export.runtime.text import TextStream
from mbq_export.runtime.timing import Clock, RequestStatistics, statistics_of

logger = logging.getLogger(__name__)


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
class Generation:
    """A finished answer.

    Attributes:
        ids: Generated tokens, the end token included.
        text: Their text up to a stop string, special tokens left out.
        reason: Why it ended: ``end`` (end token), ``stop`` (stop string), ``length`` or ``collapse``.
        collapsed: What is wrong with the text (W1105), or an empty string.
        statistics: What it cost.
    """

    ids: tuple[int, ...]
    text: str
    reason: str
    collapsed: str
    statistics: RequestStatistics


class Stream:
    """An answer in the making: iterate over its tokens, then ask for the `Generation`."""

    def __init__(self, model: Model, prepared: Prepared, options: Options) -> None:
        """Check that prompt and answer fit; run nothing yet.

        Raises:
            UsageError: E2009.
        """
        Request(model, prepared).check(options.max_new_tokens)
        self._model = model
        self._prepared = prepared
        self._options = options
        self._tokens = self._generate()
        self._generation: Generation | None = None

    def __iter__(self) -> Iterator[Token]:
        """Generate until an end token, a stop string, a collapse, or the most tokens wanted."""
        return self._tokens

    def result(self) -> Generation:
        """Return the finished answer, generating what has not been asked for yet.

        Raises:
            RuntimeError: If the iteration was closed or has failed.
        """
        for _ in self._tokens:
            pass
        if self._generation is None:
            raise RuntimeError("the iteration over this answer was closed or has failed")
        return self._generation

    def _generate(self) -> Iterator[Token]:
        options, decode = self._options, self._model.preprocessor.decode
        request = Request(self._model, self._prepared)
        sampler, text = Sampler(options), TextStream(decode, stop=options.stop)
        ids: list[int] = []
        reason = ""
        logits = request.prefill()
        while True:
            with request.clock.lap("sample"), located(f"token {len(ids)}"):
                ids.append(sampler.choose(logits))
            piece = text.push(ids[-1])
            reason = self._reason(ids, text)
            piece += text.finish() if reason else ""
            request.clock.token()
            yield Token(id=ids[-1], text=piece)
            if reason:
                break
            request.clock.resume()
            logits = request.step(ids[-1])
        self._generation = self._finished(ids, text, reason, request.clock)

    def _reason(self, ids: list[int], text: TextStream) -> str:
        """Why generation ends here, or an empty string."""
        options = self._options
        if not options.ignore_end and ids[-1] in self._model.preprocessor.eos_ids:
            return "end"
        if text.stopped:
            return "stop"
        if not options.ignore_end and collapse(ids):
            return "collapse"
        return "length" if len(ids) == options.max_new_tokens else ""

    def _finished(self, ids: list[int], text: TextStream, reason: str, clock: Clock) -> Generation:
        collapsed = collapse(ids) if reason == "collapse" else ""
        if reason == "end" and not text.text.strip():
            collapsed = "no text at all"
        if collapsed:
            logger.warning("MBQ-W1105: the answer degenerates: %s", collapsed)
        return Generation(
            ids=tuple(ids),
            text=text.text,
            reason=reason,
            collapsed=collapsed,
            statistics=statistics_of(
                clock,
                visual_tokens=self._prepared.visual_tokens,
                prompt_tokens=self._prepared.prompt_tokens,
            ),
        )
