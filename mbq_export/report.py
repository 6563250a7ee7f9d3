"""What was measured and what was checked, in one shape for validate, bench and report.

    samples ── Statistics ──► Measurement ─┐
                                           ├──► Report ── write ──► JSON ── read ──► Report
    value against threshold ──► Check ─────┘

Units stand in the keys (``decode_ms``), a value nobody measured is null beside ``<key>_why``, never 0, and
NaN is never written: diagnostics spell it ``"nan"``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from mbq_export.errors import FormatError, IncompatibleError
from mbq_export.reading import read_json
from mbq_export.writing import json_bytes, write_file

SCHEMA_MAJOR: Final = 1
SCHEMA_PREFIX: Final = "mbq-export/"
REPORT_LIMIT_BYTES: Final = 64 << 20

PERCENTILES: Final = (10, 50, 90, 95, 99)
SAMPLES_FOR_P99: Final = 100
"""Below this, the 99th percentile is the maximum by another name, so it is not given."""

SAMPLE_DIGITS: Final = 6
"""Digits kept behind the point: a nanosecond when the unit is ms."""

Number = float | int


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """How samples spread, in their own unit.

    Attributes:
        count: Number of samples, at least 1.
        mean: Arithmetic mean.
        stdev: Sample standard deviation (n - 1); None for one sample.
        cov_percent: 100 * stdev / mean; None for one sample or a zero mean.
        lowest: Smallest sample.
        highest: Largest sample.
        percentiles: Percent to value, linear interpolation; 99 is None below `SAMPLES_FOR_P99`.
    """

    count: int
    mean: float
    stdev: float | None
    cov_percent: float | None
    lowest: float
    highest: float
    percentiles: Mapping[int, float | None]

    @classmethod
    def of(cls, samples: Sequence[Number]) -> Self:
        """Summarise samples.

        Raises:
            ValueError: If there is no sample, or one is not finite.
        """
        values = np.asarray(samples, np.float64)
        if not values.size or not np.isfinite(values).all():
            raise ValueError(f"cannot summarise {values.size} samples, or one is not finite")
        mean = float(values.mean())
        stdev = float(values.std(ddof=1)) if values.size > 1 else None
        found: dict[int, float | None] = {
            percent: float(np.percentile(values, percent)) for percent in PERCENTILES
        }
        if values.size < SAMPLES_FOR_P99:
            found[99] = None
        return cls(
            count=int(values.size),
            mean=mean,
            stdev=stdev,
            cov_percent=100 * stdev / mean if stdev is not None and mean else None,
            lowest=float(values.min()),
            highest=float(values.max()),
            percentiles=found,
        )

    @property
    def median(self) -> float:
        """The 50th percentile."""
        value = self.percentiles[50]
        return math.nan if value is None else value

    def as_json(self, unit: str) -> dict[str, Any]:
        """Return the statistics with the unit in each key, for example ``p50_ms``."""
        suffix = f"_{unit}" if unit else ""
        few = f"{self.count} samples, needs {SAMPLES_FOR_P99}"
        return {
            "count": self.count,
            f"mean{suffix}": self.mean,
            **nullable(f"stdev{suffix}", self.stdev, why="one sample has no spread"),
            **nullable("cov_percent", self.cov_percent, why="one sample, or a mean of zero"),
            f"min{suffix}": self.lowest,
            **{
                key: value
                for percent, found in self.percentiles.items()
                for key, value in nullable(f"p{percent}{suffix}", found, why=few).items()
            },
            f"max{suffix}": self.highest,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One quantity that was measured, or the reason why it was not.

    Attributes:
        name: What, as a path: ``decode``, ``peak_rss``, ``w3/tg128/decode``.
        value: The number that stands for it (of samples, the median); None if not measured.
        unit: As it ends a key: ``ms``, ``bytes``, ``gb_s``, ``percent``; empty for a plain number.
        samples: Raw samples in that unit, if it has any.
        why: Why there is no value. Demanded exactly when there is none.
    """

    name: str
    value: Number | None
    unit: str = ""
    samples: tuple[Number, ...] = ()
    why: str = ""

    def __post_init__(self) -> None:
        """Refuse a value that is not finite, and one that is missing without a reason (ValueError)."""
        if self.value is None and not self.why:
            raise ValueError(f"{self.name} has neither a value nor a reason for having none")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"{self.name} is {self.value}: say why it could not be measured")
        if not all(map(math.isfinite, self.samples)):
            raise ValueError(f"{self.name} has a sample that is not finite")

    @classmethod
    def of_samples(cls, name: str, samples: Sequence[Number], *, unit: str, why: str = "") -> Self:
        """Measure by samples, their median standing for them; without samples, say ``why``."""
        kept = tuple(round(float(sample), SAMPLE_DIGITS) for sample in samples)
        value = Statistics.of(kept).median if kept else None
        return cls(
            name=name,
            value=value,
            unit=unit,
            samples=kept,
            why=why if value is None else "",
        )

    @property
    def key(self) -> str:
        """Last part of the name with its unit, for example ``decode_ms``."""
        return f"{self.name.rpartition('/')[2]}{f'_{self.unit}' if self.unit else ''}"

    @property
    def spread(self) -> Statistics | None:
        """Statistics of the samples; None if there are none."""
        return Statistics.of(self.samples) if self.samples else None

    def entry(self) -> dict[str, Any]:
        """Return ``{key: value}``, with the reason beside a value that is null."""
        return nullable(self.key, self.value, why=self.why)

    def as_json(self) -> dict[str, Any]:
        """Return everything, raw samples included."""
        spread = self.spread
        return {
            "name": self.name,
            "unit": self.unit,
            **nullable("value", self.value, why=self.why),
            "statistics": spread.as_json(self.unit) if spread else None,
            "samples": list(self.samples),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question with the answer yes, no, or not asked.

    Attributes:
        name: Which, for example ``parity.cosine``.
        ok: True if it passed, False if not, None if it was not run.
        tier: Group it belongs to, for example ``numeric``.
        value: What was found; may be NaN, which is a finding.
        threshold: What was demanded.
        modality: ``vision``, ``prompt``, ``answer``, or empty for all.
        worst: The worst single case behind ``value``.
        place: Where the worst case lies, for example a layer.
        why: Reason for a failure, or for not running.
    """

    name: str
    ok: bool | None
    tier: str = ""
    value: Number | None = None
    threshold: Number | None = None
    modality: str = ""
    worst: Number | None = None
    place: str = ""
    why: str = ""

    def __post_init__(self) -> None:
        """Refuse a check that was not run and does not say why (ValueError)."""
        if self.ok is None and not self.why:
            raise ValueError(f"{self.name} was not run and does not say why")

    def as_json(self) -> dict[str, Any]:
        """Return the check as CLI readers see it: ``pass`` is false and ``run`` too if it was not run."""
        return {
            "name": self.name,
            "tier": self.tier,
            "modality": self.modality,
            "threshold": diagnostic(self.threshold),
            "value": diagnostic(self.value),
            "worst": diagnostic(self.worst),
            "place": self.place,
            "pass": bool(self.ok),
            "run": self.ok is not None,
            "why": self.why,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one command found.

    Attributes:
        kind: Name of the command, also of the schema: ``validate``, ``bench``.
        measurements: Numbers.
        checks: Gates.
        context: What they were found on: bundle, machine, workload, versions.
        details: Whatever else readers of this kind expect, JSON values only; keys stand at top level.
        valid: False if the numbers should not be believed, for example because the machine was noisy.
    """

    kind: str
    measurements: tuple[Measurement, ...] = ()
    checks: tuple[Check, ...] = ()
    context: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    valid: bool = True

    @property
    def schema(self) -> str:
        """Schema string of the JSON form."""
        return f"{SCHEMA_PREFIX}{self.kind}@{SCHEMA_MAJOR}"

    @property
    def passed(self) -> bool:
        """Whether no check failed; checks that were not run do not count."""
        return not any(check.ok is False for check in self.checks)

    def __getitem__(self, name: str) -> Measurement:
        """Return the measurement of that name; KeyError if there is none."""
        return {measurement.name: measurement for measurement in self.measurements}[name]

    def check_rows(self) -> list[tuple[str, ...]]:
        """Return (tier, name, modality, value, threshold, verdict) for a table."""
        return [
            (
                check.tier,
                check.name,
                check.modality,
                shown(check.value),
                shown(check.threshold),
                {None: "not run", True: "pass", False: "FAIL"}[check.ok],
            )
            for check in self.checks
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the JSON form; only plain values, no NaN."""
        fixed = {
            "schema": self.schema,
            "kind": self.kind,
            "valid": self.valid,
            "pass": self.passed,
            "context": self.context,
            "measurements": [measurement.as_json() for measurement in self.measurements],
            "checks": [check.as_json() for check in self.checks],
        }
        return dict(plain_json({**self.details, **fixed}))

    def write(self, path: Path) -> None:
        """Write the JSON form, whole or not at all.

        Raises:
            ResourceError: E5001 or E5008.
        """
        write_file(path, json_bytes(self.as_json()))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote.

        Raises:
            FormatError: E4805 if it is not the JSON form of a report.
            IncompatibleError: E7004 if its schema is newer.
        """
        return cls.from_json(
            read_json(path, limit=REPORT_LIMIT_BYTES, code="E4805"), name=path.name
        )

    @classmethod
    def from_json(cls, found: Mapping[str, Any], *, name: str = "the report") -> Self:
        """Undo `as_json`.

        Raises:
            FormatError: E4805 if it is not the JSON form of a report.
            IncompatibleError: E7004 if its schema is newer.
        """
        kind, _, major = str(found.get("schema", "")).removeprefix(SCHEMA_PREFIX).partition("@")
        if not kind or not major.isdigit():
            raise _damaged(name, f"schema {found.get('schema')!r}")
        if int(major) > SCHEMA_MAJOR:
            raise IncompatibleError(
                "E7004",
                f"{name} has schema {found['schema']}.",
                why=f"this release reads up to {SCHEMA_PREFIX}{kind}@{SCHEMA_MAJOR}",
                fix="use the release of mbq-export that wrote it",
            )
        fixed = {"schema", "kind", "valid", "pass", "context", "measurements", "checks"}
        try:
            return cls(
                kind=kind,
                valid=bool(found["valid"]),
                context=dict(found["context"]),
                measurements=tuple(_measurement(entry) for entry in found["measurements"]),
                checks=tuple(_check(entry) for entry in found["checks"]),
                details={key: value for key, value in found.items() if key not in fixed},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(name, f"{type(error).__name__} {error}") from error


def nullable(key: str, value: Any, *, why: str) -> dict[str, Any]:
    """Return ``{key: value}``, or null with ``<key>_why`` beside it."""
    return {key: value} if value is not None else {key: None, f"{key}_why": why}


def diagnostic(value: Number | None) -> Number | str | None:
    """Return a finding as JSON can hold it: NaN and infinities as strings."""
    if value is None or math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def shown(value: Number | None, digits: int = 4) -> str:
    """Return a number for a table; an empty cell if there is none."""
    return "" if value is None else f"{value:.{digits}g}"


def plain_json(value: Any) -> Any:
    """Turn numpy values and tuples into what JSON has, and NaN into a string; leave the rest alone."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(inner) for inner in value]
    return diagnostic(value) if isinstance(value, float) else value


def _measurement(entry: Mapping[str, Any]) -> Measurement:
    return Measurement(
        name=str(entry["name"]),
        value=_number(entry["value"]),
        unit=str(entry["unit"]),
        samples=tuple(map(float, entry["samples"])),
        why=str(entry.get("value_why", "")),
    )


def _check(entry: Mapping[str, Any]) -> Check:
    return Check(
        name=str(entry["name"]),
        ok=bool(entry["pass"]) if entry["run"] else None,
        tier=str(entry["tier"]),
        value=_number(entry["value"]),
        threshold=_number(entry["threshold"]),
        modality=str(entry["modality"]),
        worst=_number(entry["worst"]),
        place=str(entry["place"]),
        why=str(entry["why"]),
    )


def _number(found: Number | str | None) -> Number | None:
    """Undo `diagnostic`."""
    return found if found is None or isinstance(found, int | float) else float(found)


def _damaged(name: str, found: str) -> FormatError:
    return FormatError(
        "E4805",
        f"{name} is not a result of ours: {found}.",
        why="a result file is written by validate or bench",
        fix="run the command again with -o",
    )
