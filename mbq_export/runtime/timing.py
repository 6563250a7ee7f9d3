"""What one request cost: a clock read around the real calls, nothing modelled.

    request in ── preprocess ─ vision ─ merge ─ prefill ─ sample ──► token 1      = TTFT
    token i    ── decode ─ sample ────────────────────────────────► token i + 1  = one gap (ITL)

Time the caller spends between tokens (printing, say) belongs to neither.
"""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mbq_export.report import nullable

NS_PER_MS: Final = 1e6
ONCE: Final = ("preprocess", "vision", "merge", "prefill")
PER_TOKEN: Final = ("decode", "sample")
SELF_STATUS: Final = "/proc/self/status"


class Clock:
    """Stop-watch of one request."""

    def __init__(self, *, preprocess_ms: float = 0.0) -> None:
        """Start; what was spent before on preparing the request is part of it."""
        self.laps: dict[str, list[float]] = {name: [] for name in (*ONCE, *PER_TOKEN)}
        self.laps["preprocess"].append(preprocess_ms)
        self.gaps: list[float] = []
        self._since = time.perf_counter_ns() - int(preprocess_ms * NS_PER_MS)

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """Time one phase."""
        start = time.perf_counter_ns()
        yield
        self.laps[name].append((time.perf_counter_ns() - start) / NS_PER_MS)

    def token(self) -> None:
        """Note that a token is out: the first gap is the time to first token."""
        self.gaps.append((time.perf_counter_ns() - self._since) / NS_PER_MS)

    def resume(self) -> None:
        """Start the next gap, when the caller asks for more."""
        self._since = time.perf_counter_ns()


@dataclass(frozen=True, kw_only=True)
class RequestStatistics:
    """What one request cost, in milliseconds.

    Attributes:
        visual_tokens: Positions filled with image features.
        prompt_tokens: The other positions of the prompt.
        output_tokens: Tokens generated, the end token included.
        preprocess_ms: Pictures and text to tiles and ids.
        vision_ms: Vision engine over all tiles; 0 without pictures.
        merge_ms: Prompt ids to embeddings with image rows in place.
        prefill_ms: Merged embeddings to first logits.
        decode_ms: Per later token: its embedding and the decoder.
        sample_ms: Per token: logits to id.
        ttft_ms: Request in to first token out.
        itl_ms: Per later token: from the token before it.
        peak_rss_bytes: Largest resident memory of the process so far; None where nobody tells.
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
    itl_ms: tuple[float, ...]
    peak_rss_bytes: int | None

    @property
    def e2e_ms(self) -> float:
        """Request in to last token out."""
        return self.ttft_ms + sum(self.itl_ms)

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per token behind the first; None if there is none."""
        return sum(self.itl_ms) / len(self.itl_ms) if self.itl_ms else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens behind the first per second; None if there is none."""
        return 1000 / self.tpot_ms if self.tpot_ms else None

    def line(self) -> str:
        """Return the one line that ``run`` prints."""
        parts = [
            f"visual {self.visual_tokens}",
            f"prompt {self.prompt_tokens}",
            f"out {self.output_tokens}",
            f"TTFT {self.ttft_ms:.0f} ms",
        ]
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:.1f} tok/s")
        if self.peak_rss_bytes is not None:
            parts.append(f"peak {self.peak_rss_bytes / 1e9:.1f} GB")
        return " · ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """Return the JSON form; what does not exist is null with its reason."""
        single = "a single token was generated"
        return {
            "visual_tokens": self.visual_tokens,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "preprocess_ms": self.preprocess_ms,
            "vision_ms": self.vision_ms,
            "merge_ms": self.merge_ms,
            "prefill_ms": self.prefill_ms,
            "ttft_ms": self.ttft_ms,
            "e2e_ms": self.e2e_ms,
            **nullable("tpot_ms", self.tpot_ms, why=single),
            **nullable("tokens_per_second", self.tokens_per_second, why=single),
            **nullable(
                "peak_rss_bytes",
                self.peak_rss_bytes,
                why="the system does not tell a process's peak",
            ),
        }


def statistics_of(clock: Clock, *, visual_tokens: int, prompt_tokens: int) -> RequestStatistics:
    """Summarise a request of which at least one token is out."""
    laps = clock.laps
    return RequestStatistics(
        visual_tokens=visual_tokens,
        prompt_tokens=prompt_tokens,
        output_tokens=len(clock.gaps),
        ttft_ms=clock.gaps[0],
        itl_ms=tuple(clock.gaps[1:]),
        peak_rss_bytes=peak_rss_bytes(),
        preprocess_ms=sum(laps["preprocess"]),
        vision_ms=sum(laps["vision"]),
        merge_ms=sum(laps["merge"]),
        prefill_ms=sum(laps["prefill"]),
        decode_ms=tuple(laps["decode"]),
        sample_ms=tuple(laps["sample"]),
    )


def peak_rss_bytes() -> int | None:
    """Return the largest resident memory this process has had.

    Linux keeps it per address space (``VmHWM``); ``getrusage`` is the second choice, because a process
    started by a larger one inherits that one's peak there.
    """
    return status_bytes("VmHWM") or _usage_bytes()


def rss_bytes() -> int | None:
    """Return the resident memory of this process now; None where the system does not tell."""
    return status_bytes("VmRSS")


def status_bytes(field: str) -> int | None:
    """Read a size from the kernel's status of this process."""
    try:
        lines = Path(SELF_STATUS).read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(sizes[0]) * 1024 if sizes else None


def _usage_bytes() -> int | None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
