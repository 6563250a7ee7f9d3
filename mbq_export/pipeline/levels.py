"""Operators and cache of the decoder for engines: the most that the parsers of all targets read.

TensorRT 10.3    primitives                 cache grows        (JetPack 6)
10.14            Attention                  cache grows
10.15, RTX 1.7   rotation, norms, cache update                 written in place
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mbq_export.backends.base import SizeRange
from mbq_export.errors import UsageError
from mbq_export.export import ops
from mbq_export.export.profile import FUSED, OF_LEVEL, PROFILES, has_static_cache, profile_for
from mbq_export.export.record import GraphForm
from mbq_export.target import OP_LEVELS, Target

AUTO: Final = "auto"
STATIC, GROWING = "static", "concat"
CACHE_OF_8_BITS: Final = "int8"
"""What people ask for, and nothing here writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """What the decoder for engines may use.

    Attributes:
        op_level: Value of `GraphForm.op_level`.
        kv: ``static`` or ``concat``.
    """

    op_level: str
    kv: str

    def told(self, lowering: str, *, packed: bool) -> str:
        """Say it in words, for the log of a build.

        Args:
            lowering: Form of the decoder.
            packed: Whether any linear is quantized.
        """
        form = GraphForm(lowering=lowering, op_level=self.op_level, kv=self.kv)
        profile = profile_for(form, packed=packed)
        first = ".".join(map(str, profile.first))
        return f"{profile.name} (TensorRT {first} and newer), {self.kv} cache"


def engine_level(op_level: str, kv: str | None, *, targets: Sequence[Target]) -> Level:
    """Decide operators and cache.

    Args:
        op_level: As asked for, or `AUTO`.
        kv: As asked for; None takes the cache that is written in place where the targets read it.
        targets: Devices to build engines for; without any, graphs are for the newest.

    Raises:
        UsageError: E2001 for an unknown level or cache, E2006 for one of 8 bits, E2002 for a cache that the level lacks, E2012 for a level that
            a target does not read.
    """
    if kv == CACHE_OF_8_BITS:
        raise UsageError(
            "E2006",
            "No graph here has a cache of 8 bits.",
            why="keys and values stay in the type of the activations; TensorRT's own cache layer knows no other",
            fix=(
                "mbq-export validate BUNDLE --kv-bits 8 tells what it would cost answers",
                "leave out --kv",
            ),
        )
    lowest = min(targets, key=lambda target: target.op_level, default=None)
    readable = FUSED if lowest is None else min(lowest.op_level, FUSED)
    named = OF_LEVEL[readable] if op_level == AUTO else op_level
    level = Level(op_level=named, kv=kv or (STATIC if has_static_cache(named) else GROWING))
    profile = profile_for(GraphForm(op_level=level.op_level, kv=level.kv))
    if lowest is not None and profile.level > readable:
        version = ".".join(map(str, lowest.version))
        raise UsageError(
            "E2012",
            f"{lowest} does not read op level {op_level}.",
            why=f"version {version} of its parser reads up to {_highest(readable)}",
            fix="--op-level auto",
        )
    return level


def check_version(target: Target, version: str) -> None:
    """Refuse a TensorRT older than any that graphs are written for.

    Raises:
        UsageError: E2012.
    """
    if target.op_level >= 0:
        return
    (oldest, _), *_ = OP_LEVELS[target.flavour]
    first = ".".join(map(str, oldest))
    raise UsageError(
        "E2012",
        f"{target.flavour} {version} reads no graph that this release writes for {target}.",
        why=f"graphs are written for version {first} and newer",
        fix=(f"install version {first} or newer", "--target cpu: the bundle runs on ONNX Runtime"),
    )


def growing_sizes(sizes: Mapping[str, SizeRange], max_context: int) -> dict[str, SizeRange]:
    """Ranges of a decoder whose cache grows, from those of its other symbols.

    A past has one hidden position more than there are tokens (`backends._trt_kept`), and what comes out is past and new
    tokens together, at each end of the ranges. Kernels are chosen for a context that is half full.

    Args:
        sizes: Ranges of ``batch_size`` and ``sequence_length``.
        max_context: Most tokens.
    """
    new = sizes[ops.SEQUENCE]
    past = SizeRange(smallest=1, typical=max(1, max_context // 2), largest=max_context)
    return {
        **sizes,
        ops.PAST: past,
        ops.TOTAL: SizeRange(
            smallest=past.smallest + new.smallest,
            typical=past.typical + new.typical,
            largest=past.largest + new.largest,
        ),
    }


def _highest(level: int) -> str:
    """Name of the highest profile of a level."""
    return [name for name, profile in PROFILES.items() if profile.level == level][-1]
