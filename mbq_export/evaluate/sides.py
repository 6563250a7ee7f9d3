"""The two sides of a comparison: the reference model, and whatever is tested, asked the same things.

    Oracle    transformers' own forward and generate, weights from the checkpoint's codes
    Tested    a session: engines, host packing, cache; its decoder tapped where values are wanted

Nothing of the exporter or the runtime is on the reference's path: pictures are packed, tokens generated and
caches kept by transformers.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from mbq_export.backends.ort import open_graph
from mbq_export.backends.torch import decoder_engine
from mbq_export.evaluate.taps import Recorder, tapped_graph, torch_values
from mbq_export.export.ops import INPUTS_EMBEDS, LOGITS
from mbq_export.families.base import ANSWER
from mbq_export.native import CALL_SECONDS
from mbq_export.runtime import (
    DECODER,
    ORACLE,
    TORCH,
    Session,
    Tuning,
    graph_record,
    open_session,
)
from mbq_export.runtime.request import Engines, Prepared
from mbq_export.runtime.sampling import Options

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from mbq_export.backends.base import Engine
    from mbq_export.bundle import Bundle
    from mbq_export.evaluate.taps import Values
    from mbq_export.families.base import LoadedModel
    from mbq_export.families.inputs import ModelInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is tested.

    Attributes:
        bundle: The bundle.
        backend: Name of a backend.
        lowering: Form of the decoder graph; the torch backend has none.
        dtype: Type of its activations, ``fp32`` or ``fp16``.
        threads: CPU threads; 0 takes all.
        accuracy_level: Of ONNX Runtime's 4-bit products; 0 is exact.
        engine_timeout_s: Limit of one call of an engine.
    """

    bundle: Bundle
    backend: str = "ort"
    lowering: str = "qdq"
    dtype: str = "fp32"
    threads: int = 0
    accuracy_level: int = 0
    engine_timeout_s: float = CALL_SECONDS

    @property
    def name(self) -> str:
        """How reports call it, for example ``ort:qdq``."""
        return self.backend if self.backend == TORCH else f"{self.backend}:{self.lowering}"

    def open(self) -> Session:
        """Open the session as users do; the torch backend stands for the oracle here."""
        return open_session(
            self.bundle,
            backend=ORACLE if self.backend == TORCH else self.backend,
            lowering=self.lowering,
            dtype=self.dtype,
            threads=self.threads,
            tuning=Tuning(
                accuracy_level=self.accuracy_level, engine_timeout_s=self.engine_timeout_s
            ),
        )


class Oracle:
    """A model run by transformers alone."""

    def __init__(self, model: LoadedModel) -> None:
        """Keep a model that is loaded completely."""
        self.model = model

    @torch.no_grad()
    def values(self, inputs: ModelInputs, names: Sequence[str] = ()) -> Values:
        """Run one sample.

        Args:
            inputs: Prompt, pictures and, teacher-forced, the answer.
            names: Further values, as in `taps`.

        Returns:
            ``logits`` (T, V) and the values asked for, (T, C) each.
        """
        with torch_values(self.model.module, self.model.family, names) as caught:
            found = self.model.module(**inputs.tensors(), use_cache=False)
        return {**caught, LOGITS: found.logits[0].float().numpy()}

    @torch.no_grad()
    def greedy(self, prompt: ModelInputs, *, new_tokens: int) -> list[int]:
        """Answer greedily.

        Args:
            prompt: Without an answer.
            new_tokens: Most tokens.

        Returns:
            The answer's ids, its end token included.
        """
        ends = sorted(self.model.processor.eos_ids)
        # The module is typed as any torch module, which has no generate.
        generate: Any = self.model.module.generate
        found = generate(
            **prompt.tensors(),
            attention_mask=torch.ones(1, len(prompt.input_ids), dtype=torch.long),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
        ids: list[int] = found[0, len(prompt.input_ids) :].tolist()
        return ids


class Tested:
    """A session that answers, in the manner of `Oracle`."""

    def __init__(self, session: Session, watch: Watch) -> None:
        """Join a session with what watches its decoder."""
        self._session = session
        self._watch = watch

    def values(self, inputs: ModelInputs) -> Values:
        """Run one sample; return ``logits`` (T, V) and the tapped values, (T, C) each."""
        with self._watch() as caught:
            logits = self._session.teacher_forced(inputs)
        return {**caught, LOGITS: logits}

    def greedy(self, prompt: ModelInputs, *, new_tokens: int) -> Answer:
        """Answer greedily."""
        found = self._session.generate(
            Prepared(inputs=prompt), options=Options(max_new_tokens=new_tokens)
        )
        return Answer(ids=list(found.ids), collapsed=found.collapsed)


class Watch(Protocol):
    """Catches values while something runs."""

    def __call__(self) -> Any:
        """Return a context manager of the dictionary that holds them afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A free answer.

    Attributes:
        ids: Its tokens, the end token included; generation stops where the answer collapses.
        collapsed: What is wrong with it, or an empty string.
    """

    ids: list[int]
    collapsed: str


@contextmanager
def open_tested(setup: Setup, oracle: Oracle, names: Sequence[str] = ()) -> Iterator[Tested]:
    """Open the tested side.

    Args:
        setup: What is tested.
        oracle: Its model runs the torch backend, so that it is not loaded twice.
        names: Values to tap, and `inputs_embeds` with them; without any the decoder is the one users run.

    Raises:
        FormatError: E4407 if the graph lacks one of the values.
        MbqError: As `runtime.open_session`.
    """
    with setup.open() as session:
        if not names:
            yield Tested(session, watch=_nothing)
        elif setup.backend == TORCH:
            model = oracle.model
            with _with_decoder(session, decoder_engine(model)) as changed:
                wanted = (INPUTS_EMBEDS, *names)
                yield Tested(changed, lambda: torch_values(model.module, model.family, wanted))
        else:
            recorder = Recorder(_tapped_decoder(setup, names), names)
            with _with_decoder(session, recorder) as changed:
                yield Tested(changed, lambda: _recorded(recorder))


@contextmanager
def _nothing() -> Iterator[Values]:
    yield {}


@contextmanager
def _recorded(recorder: Recorder) -> Iterator[Values]:
    caught: Values = {}
    recorder.take()
    yield caught
    caught.update(recorder.take())


@contextmanager
def _with_decoder(session: Session, decoder: Engine) -> Iterator[Session]:
    """The same session with another decoder."""
    engines = session.model.engines
    # The decoder that is not used is closed: two would double the memory.
    engines.decoder.close()
    changed = Engines(vision=engines.vision, embed=engines.embed, decoder=decoder)
    with decoder:
        yield Session(replace(session.model, engines=changed), name=session.name)


def _tapped_decoder(setup: Setup, names: Sequence[str]) -> Engine:
    file = graph_record(setup.bundle, DECODER, dtype=setup.dtype, lowering=setup.lowering)["file"]
    path = setup.bundle.onnx / file
    return open_graph(
        path,
        threads=setup.threads,
        accuracy_level=setup.accuracy_level,
        proto=tapped_graph(path, names),
    )


def prompt_of(inputs: ModelInputs) -> ModelInputs:
    """Leave out the teacher-forced answer behind the prompt; earlier answers of a conversation stay."""
    other = np.flatnonzero(inputs.token_classes != ANSWER)
    end = int(other[-1]) + 1 if len(other) else 0
    return replace(
        inputs, input_ids=inputs.input_ids[:end], token_classes=inputs.token_classes[:end]
    )


def with_answer(prompt: ModelInputs, ids: Sequence[int]) -> ModelInputs:
    """Teacher-force an answer behind a prompt."""
    return replace(
        prompt,
        input_ids=np.concatenate([prompt.input_ids, np.asarray(ids, np.int64)]),
        token_classes=np.concatenate([prompt.token_classes, np.full(len(ids), ANSWER, np.int8)]),
    )


def answer_rows(values: NDArray[Any], prompt: ModelInputs) -> NDArray[Any]:
    """Rows that predict the tokens of an answer: from the prompt's last position to the last but one."""
    start = len(prompt.input_ids) - 1
    return values[start:-1]
