"""What the user may ask of an engine beside its target: sizes of the profile, how the builder works, which plugins."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mbq_export.backends._trt_preflight import check_options
from mbq_export.backends.base import BuilderOptions, SizeRange
from mbq_export.errors import UsageError
from mbq_export.reading import sha256_of
from mbq_export.target import Target

TYPICAL_TILES: Final = 5
LARGEST_CHUNK: Final = 512
"""Tokens of one prefill call; a longer prompt is fed in chunks (TENSORRT 11)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How engines are built.

    Attributes:
        plugin_lib: Plugin library to use, or None to search for one.
        max_batch: Most requests in one call.
        max_tiles: Most picture tiles in one call of the vision engine.
        opt_tokens: Tokens of the call that kernels are chosen for: 1 is a decode step.
        workspace_mib: Scratch memory the builder may plan with.
        weight_streaming: Let the device keep weights in host memory.
        timing_cache: File with the times that an earlier build measured; full TensorRT only.
        one_plan: One engine for all targets of a flavour, instead of one each.
    """

    plugin_lib: Path | None = None
    max_batch: int = 1
    max_tiles: int = 2 * TYPICAL_TILES
    opt_tokens: int = 1
    workspace_mib: int = 1024
    weight_streaming: bool = False
    timing_cache: Path | None = None
    one_plan: bool = False

    def check(self, max_context: int, targets: Sequence[Target] = ()) -> None:
        """Refuse sizes that contradict each other, and what the builder of a target cannot do.

        Raises:
            UsageError: E2008 for sizes, E2002 or E2012 for a target.
        """
        for devices in self.plans(targets):
            check_options(devices[0].flavour, devices, self.builder())
        chunk = self.largest_chunk(max_context)
        if self.opt_tokens > chunk:
            raise UsageError(
                "E2008",
                f"--opt-tokens {self.opt_tokens} is more than an engine takes in one call.",
                why=f"a call has at most {chunk} tokens; a longer prompt is fed in parts",
                fix=f"--opt-tokens {chunk}",
            )

    def plans(self, targets: Sequence[Target]) -> list[tuple[Target, ...]]:
        """Devices of each plan: one each, or all of a flavour."""
        if not self.one_plan:
            return [(target,) for target in targets]
        by_flavour: dict[str, list[Target]] = {}
        for target in targets:
            by_flavour.setdefault(target.flavour, []).append(target)
        return [tuple(each) for each in by_flavour.values()]

    def largest_chunk(self, max_context: int) -> int:
        """Most tokens of one call of the decoder."""
        return min(LARGEST_CHUNK, max_context)

    def decoder_sizes(self, max_context: int) -> dict[str, SizeRange]:
        """Range of every symbol of the decoder with a static cache."""
        chunk = self.largest_chunk(max_context)
        return {
            "batch_size": SizeRange(smallest=1, typical=1, largest=self.max_batch),
            "sequence_length": SizeRange(smallest=1, typical=self.opt_tokens, largest=chunk),
        }

    def vision_sizes(self, symbol: str) -> dict[str, SizeRange]:
        """Range of the number of tiles."""
        typical = min(TYPICAL_TILES, self.max_tiles)
        return {symbol: SizeRange(smallest=1, typical=typical, largest=self.max_tiles)}

    def builder(self) -> BuilderOptions:
        """The part that the builder is told."""
        return BuilderOptions(
            workspace_mib=self.workspace_mib,
            weight_streaming=self.weight_streaming,
            timing_cache=self.timing_cache,
        )

    def fingerprint(self) -> dict[str, Any]:
        """Whatever of it decides the result; the plugin library is named by its content elsewhere."""
        cache = self.timing_cache
        return {
            "max_batch": self.max_batch,
            "max_tiles": self.max_tiles,
            "opt_tokens": self.opt_tokens,
            "workspace_mib": self.workspace_mib,
            "weight_streaming": self.weight_streaming,
            "timing_cache": sha256_of(cache) if cache is not None and cache.is_file() else None,
            "one_plan": self.one_plan,
        }
