"""What the user may ask of an engine beside its target: sizes of the profile, how the builder works, which plugins."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mbq_export.backends._trt_preflight import check_options
from mbq_export.backends.base import BuilderOptions, SizeRange
from mbq_export.errors import UsageError
from mbq_export.export.lowerings import LOWERINGS
from mbq_export.reading import sha256_of
from mbq_export.schemes.base import QuantScheme
from mbq_export.target import Target

AUTO: Final = "auto"
FP16: Final = "fp16"
BF16: Final = "bf16"
DTYPES: Final = (AUTO, FP16, BF16)
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
        dtype: Type of activations: ``fp16``, ``bf16``, or ``auto`` for what the model's activations need.
        embed_engine: Also build an engine that looks embeddings up, which the host does otherwise.
    """

    plugin_lib: Path | None = None
    max_batch: int = 1
    max_tiles: int = 2 * TYPICAL_TILES
    opt_tokens: int = 1
    workspace_mib: int = 1024
    weight_streaming: bool = False
    timing_cache: Path | None = None
    one_plan: bool = False
    dtype: str = AUTO
    embed_engine: bool = False

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

    def check_dtype(self, lowering: str | None, scheme: QuantScheme | None) -> None:
        """Refuse a type that does not exist, or that the form of the decoder is not written in.

        Args:
            lowering: Form of the decoder; None if there are no engines.
            scheme: Number format; None for the unquantized baseline.

        Raises:
            UsageError: E2001, E2002.
        """
        if self.dtype not in DTYPES:
            raise UsageError(
                "E2001",
                f"Unknown --engine-dtype {self.dtype!r}.",
                why=f"known: {', '.join(DTYPES)}",
                fix=f"--engine-dtype {AUTO}",
            )
        if lowering is None or self.dtype == AUTO:
            return
        reason = LOWERINGS[lowering].misfit(scheme, "trt", self.dtype)
        if reason is not None:
            raise UsageError(
                "E2002",
                f"There are no {self.dtype} engines of --lowering {lowering} here.",
                why=reason,
                fix=("mbq-export plugins build, and --lowering plugin", f"--engine-dtype {FP16}"),
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

    def embed_sizes(self, max_context: int) -> dict[str, SizeRange]:
        """Range of every symbol of the embedding, which takes a prompt at once."""
        length = SizeRange(smallest=1, typical=self.opt_tokens, largest=max_context)
        return {**self.decoder_sizes(max_context), "sequence_length": length}

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
            "dtype": self.dtype,
            "embed_engine": self.embed_engine,
        }
