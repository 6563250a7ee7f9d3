"""Everything a report is made of: bundles with what lies in them, and results of validate, bench and others.

    bundle/    manifest, provenance, calibration, checkpoint record, engines; reports/*.json become results
    folder/    *.json results
    file.json  a result

An input that the user names must be readable. A part inside a bundle that is not becomes a remark, so that
the rest can still be shown.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mbq_export.bundle import MANIFEST, PROVENANCE, Bundle
from mbq_export.errors import FormatError, IncompatibleError, MbqError
from mbq_export.evaluate.lookup import dig
from mbq_export.reading import read_json
from mbq_export.report import REPORT_LIMIT_BYTES, Report

CALIB: Final = "calibration/calib.json"
SENSITIVITY: Final = "calibration/sensitivity.json"
CHECKPOINT: Final = "weights/mbq.json"
ENGINE: Final = "engine.json"
LAYERS: Final = "layers.json"

VALIDATE: Final = "validate"
BENCH: Final = "bench"
QUALITY_SCHEMA: Final = "mbq-export/quality"
QUALITY_MAJOR: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngines:
    """The engines of one target.

    Attributes:
        folder: Below ``engines``.
        record: ``engine.json``.
        layers: ``layers.json``; empty if it cannot be read.
    """

    folder: str
    record: Mapping[str, Any]
    layers: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A bundle, opened.

    Attributes:
        name: What the report calls it; no two share it.
        bundle: Folder and manifest.
        parts: ``calib.json``, ``sensitivity.json``, ``mbq.json``, ``provenance.json`` by path in the bundle.
        engines: One per target.
    """

    name: str
    bundle: Bundle
    parts: Mapping[str, Mapping[str, Any]]
    engines: tuple[BuiltEngines, ...]

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def model(self) -> object:
        """What tells models apart: hashes of configuration and weights; None if the manifest has none."""
        return dig(self.manifest, "source", "shards"), dig(self.manifest, "source", "config")

    def part(self, path: str, *keys: str | int) -> Any:
        """Look into one of `parts`."""
        return dig(self.parts.get(path), *keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A result file.

    Attributes:
        name: Where it came from, without folders above the named input.
        report: What it says.
        subject: Name of the bundle whose build left it; empty for others.
    """

    name: str
    report: Report
    subject: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """A table of task quality, as ``docs/benchmarks/quality.json`` has it.

    Attributes:
        name: Where it came from.
        content: ``setup``, ``rows`` and ``pairs``.
    """

    name: str
    content: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """Something that was given and is not shown."""

    name: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """All inputs of a report.

    Attributes:
        subjects: Bundles, in the order given.
        results: Results, in the order found; the same one given twice counts once.
        qualities: Tables of task quality.
        remarks: What could not be shown.
    """

    subjects: tuple[Subject, ...]
    results: tuple[Result, ...]
    qualities: tuple[Quality, ...]
    remarks: tuple[Remark, ...]

    def of_kind(self, kind: str) -> tuple[Result, ...]:
        """Results of one kind."""
        return tuple(result for result in self.results if result.report.kind == kind)

    def subject_of(self, sha256: object) -> Subject | None:
        """The bundle a result speaks of, if it is here."""
        return next((s for s in self.subjects if s.bundle.sha256 == sha256), None)

    def validations_of(self, subject: Subject) -> tuple[Result, ...]:
        """Validations of a bundle: its build's first, which knew it under the hash it had before sealing."""
        own = [r for r in self.of_kind(VALIDATE) if r.subject == subject.name]
        later = [
            r
            for r in self.of_kind(VALIDATE)
            if not r.subject and dig(r.report.context, "sha256") == subject.bundle.sha256
        ]
        return (*own, *later)


def gather(paths: Sequence[Path]) -> Found:
    """Read bundles and results.

    Args:
        paths: Bundles, folders of results and result files, in any mix.

    Raises:
        FormatError: E4805 for a path where there is nothing, or nothing of ours; E46xx for a damaged bundle.
        IncompatibleError: E7004 for a newer schema.
    """
    subjects: list[Subject] = []
    files: list[Result | Quality] = []
    remarks: list[Remark] = []
    for path in paths:
        if (path / MANIFEST).exists():
            subjects.append(_subject(path, _unused(path, subjects), remarks))
            files += _bundled(subjects[-1], remarks)
        elif path.is_dir():
            files += _folder(path, remarks)
        elif path.exists():
            files.append(_file(path, path.name))
        else:
            raise _nothing(path, "there is nothing")
    return Found(
        subjects=tuple(subjects),
        results=tuple(_once([file for file in files if isinstance(file, Result)])),
        qualities=tuple(file for file in files if isinstance(file, Quality)),
        remarks=tuple(remarks),
    )


def _subject(path: Path, name: str, remarks: list[Remark]) -> Subject:
    bundle = Bundle.open(path)
    parts = {}
    for part in (CALIB, SENSITIVITY, CHECKPOINT, PROVENANCE):
        if (path / part).exists():
            parts[part] = _read(path / part, f"{name}/{part}", remarks)
    engines = []
    for record in sorted(bundle.engines.rglob(ENGINE)):
        folder = record.parent.relative_to(bundle.engines).as_posix()
        label = f"{name}/engines/{folder}"
        engines.append(
            BuiltEngines(
                folder=folder,
                record=_read(record, f"{label}/{ENGINE}", remarks),
                layers=_read(record.with_name(LAYERS), f"{label}/{LAYERS}", remarks),
            )
        )
    return Subject(name=name, bundle=bundle, parts=parts, engines=tuple(engines))


def _read(path: Path, name: str, remarks: list[Remark]) -> Mapping[str, Any]:
    """A part of a bundle; nothing, and a remark, if it cannot be read."""
    try:
        return read_json(path, limit=REPORT_LIMIT_BYTES, code="E4604")
    except MbqError as error:
        remarks.append(Remark(name=name, why=f"MBQ-{error.code}: {error.message}"))
        return {}


def _unused(path: Path, subjects: Sequence[Subject]) -> str:
    """The folder's name, numbered if another bundle has it."""
    name, taken = path.resolve().name, {subject.name for subject in subjects}
    numbers = (f" ({index})" if index > 1 else "" for index in range(1, len(taken) + 2))
    return next(name + suffix for suffix in numbers if name + suffix not in taken)


def _bundled(subject: Subject, remarks: list[Remark]) -> Iterator[Result]:
    """Results that the build left in the bundle."""
    for path in sorted(subject.bundle.reports.glob("*.json")):
        name = f"{subject.name}/{path.parent.name}/{path.name}"
        try:
            yield Result(name=name, report=Report.read(path), subject=subject.name)
        except MbqError as error:
            remarks.append(Remark(name=name, why=f"MBQ-{error.code}: {error.message}"))


def _folder(folder: Path, remarks: list[Remark]) -> list[Result | Quality]:
    """Results in a folder; other JSON files in it are passed over with a remark."""
    found = []
    for path in sorted(folder.glob("*.json")):
        name = f"{folder.resolve().name}/{path.name}"
        try:
            found.append(_file(path, name))
        except FormatError as error:
            remarks.append(Remark(name=name, why=f"MBQ-{error.code}: {error.message}"))
    if not found:
        raise _nothing(folder, "there is neither a manifest nor a result")
    return found


def _file(path: Path, name: str) -> Result | Quality:
    content = read_json(path, limit=REPORT_LIMIT_BYTES, code="E4805")
    schema, _, major = str(content.get("schema")).partition("@")
    if schema != QUALITY_SCHEMA:
        return Result(name=name, report=Report.from_json(content, name=path.name))
    if major != str(QUALITY_MAJOR):
        raise IncompatibleError(
            "E7004",
            f"{path.name} has schema {content['schema']!r}.",
            why=f"this release reads {QUALITY_SCHEMA}@{QUALITY_MAJOR}",
            fix="use the release of mbq-export that wrote it",
        )
    return Quality(name=name, content=content)


def _once(results: Sequence[Result]) -> Iterator[Result]:
    seen: list[Report] = []
    for result in results:
        if result.report not in seen:
            seen.append(result.report)
            yield result


def _nothing(path: Path, what: str) -> FormatError:
    return FormatError(
        "E4805",
        f"At {path} {what}.",
        why="a report is made of bundles and of results of validate and bench",
        fix=("mbq-export validate BUNDLE -o DIR", "mbq-export bench BUNDLE -o DIR"),
    )
