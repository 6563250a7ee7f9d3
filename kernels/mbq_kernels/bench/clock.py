"""What times a list of launches: a CUDA graph with events on a GPU, nothing where there is none.

The protocol sees only `Clock`, so the same code runs on a GPU, in a rehearsal on a CPU, and in tests under a clock
whose times are written down.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final, Protocol

import torch

Launch = Callable[[], object]
"""Queues work on the current stream; what it returns is kept until the work is captured."""
WARM_LAUNCHES: Final = 3
"""Before capture: loads modules, makes handles and lets libraries pick their algorithms."""
REHEARSED_LAUNCHES: Final = 8


class Recorded(Protocol):
    """A list of launches, ready to be replayed."""

    def replay_us(self, count: int) -> list[float]:
        """Replay one after the other; return the time of each replay of the whole list."""


class Clock(Protocol):
    """Where launches run and whether their times mean anything."""

    device: torch.device
    measures: bool

    def record(self, launches: Sequence[Launch]) -> Recorded:
        """Run the launches in order once and keep them for replays."""

    def finish(self) -> None:
        """Wait until everything queued is done."""


class GraphClock:
    """One CUDA graph per list of launches, timed with events on its stream."""

    measures = True

    def __init__(self, device: torch.device) -> None:
        """Time on a CUDA device."""
        self.device = device

    def record(self, launches: Sequence[Launch]) -> Recorded:
        """Warm up on a side stream, as capture demands, then capture all launches into one graph."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for launch in launches[:WARM_LAUNCHES]:
                launch()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.finish()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for launch in launches:
                launch()
        return _Graph(graph, self.device)

    def finish(self) -> None:
        """Wait until the device is idle."""
        torch.cuda.synchronize(self.device)


class _Graph:
    """A captured graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
        self._graph, self._device = graph, device

    def replay_us(self, count: int) -> list[float]:
        """Events before and after each replay, read when all are done, so that the host never waits between."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            self._graph.replay()
            mark.record()
        torch.cuda.synchronize(self._device)
        return [1e3 * a.elapsed_time(b) for a, b in pairwise(marks)]


class Rehearsal:
    """Runs the first launches of every list, on a CPU, and has no times: proves that a benchmark would run."""

    measures = False

    def __init__(self) -> None:
        """Run on the CPU."""
        self.device = torch.device("cpu")

    def record(self, launches: Sequence[Launch]) -> Recorded:
        """Run a few launches: enough that every copy has its turn."""
        for launch in launches[:REHEARSED_LAUNCHES]:
            launch()
        return _Nothing()

    def finish(self) -> None:
        """Nothing is queued on a CPU."""


class _Nothing:
    """No times."""

    def replay_us(self, count: int) -> list[float]:  # noqa: ARG002 (there is nothing to repeat)
        """Return no times."""
        return []
