"""A bundle: everything one deployment needs, in one sealed folder.

    <bundle>/
      manifest.json    deterministic; its SHA-256 is the bundle's identity
      provenance.json  when, where and how long; hashes of reports and logs
      weights/         the quantized checkpoint with configuration, tokenizer and processor files
      onnx/            the graphs, their external data, mbq_export.json
      engines/         <flavour>-<version>/<sm>/{decoder,vision}.engine, engine.json, layers.json
      reports/ logs/   results of the gates; the build's events

A sealed bundle is never modified. Files are regular files: links are refused, because runtimes disagree on
whether they follow them.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mbq_export.errors import FormatError, IncompatibleError
from mbq_export.progress import Progress, silent
from mbq_export.reading import contained, read_json, sha256_of
from mbq_export.writing import json_bytes, partial_path, write_file

SCHEMA: Final = "mbq-export/bundle"
SCHEMA_MAJOR: Final = 1
MANIFEST: Final = "manifest.json"
PROVENANCE: Final = "provenance.json"
WEIGHTS: Final = "weights"
ONNX: Final = "onnx"
ENGINES: Final = "engines"
REPORTS: Final = "reports"
LOGS: Final = "logs"

FAKE_QUANT: Final = "fake_quant"
"""Fact of a manifest whose bundle was made to evaluate a checkpoint, and holds neither graphs nor engines."""

# Written after the work they describe, with times in them: hashed in the provenance, not the manifest.
VOLATILE: Final = (REPORTS, LOGS)
MANIFEST_LIMIT_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A sealed folder and what its manifest says.

    Attributes:
        root: The folder.
        manifest: Parsed `MANIFEST`, schema checked.
        sha256: SHA-256 of the manifest's bytes, the bundle's identity.
    """

    root: Path
    manifest: dict[str, Any]
    sha256: str

    @classmethod
    def open(cls, root: Path, *, verify: bool = False, progress: Progress = silent) -> "Bundle":
        """Open a bundle, checking schema, paths and sizes, and with ``verify`` every hash.

        Raises:
            FormatError: E4604 for a bad manifest, E4605 for a path that leaves the folder, E4601 for a missing
                file, E4602 for one that changed.
            IncompatibleError: E7004 for a newer schema.
        """
        path = root / MANIFEST
        if not path.is_file():
            raise _no_bundle(root)
        manifest = read_json(path, limit=MANIFEST_LIMIT_BYTES, code="E4604")
        _check_schema(manifest)
        _check_files(root, manifest["files"], verify=verify, progress=progress)
        return cls(root=root, manifest=manifest, sha256=sha256_of(path))

    @property
    def checkpoint_folder(self) -> Path:
        """The quantized checkpoint with configuration, tokenizer and processor files."""
        return self.root / WEIGHTS

    @property
    def onnx(self) -> Path:
        """The graphs."""
        return self.root / ONNX

    @property
    def engines(self) -> Path:
        """TensorRT engines; may be missing."""
        return self.root / ENGINES

    @property
    def reports(self) -> Path:
        """Results of the gates of the build."""
        return self.root / REPORTS

    @property
    def has_graphs(self) -> bool:
        """Whether it was made to be deployed, not to evaluate its checkpoint alone."""
        return self.manifest.get(FAKE_QUANT) is not True

    @property
    def name(self) -> str:
        """What tables call it: the folder's name."""
        return self.root.resolve().name


def seal(root: Path, facts: dict[str, Any], provenance: dict[str, Any]) -> str:
    """Hash every file and write manifest and provenance, the last act before publishing.

    Args:
        root: The staged folder.
        facts: Deterministic parts of the manifest (source, calibration, quant, gates, ...).
        provenance: Volatile facts (times, machine class, command line).

    Returns:
        SHA-256 of the manifest.
    """
    for name in (MANIFEST, PROVENANCE):
        (root / name).unlink(missing_ok=True)
    records = [_record(root, path) for path in sorted(root.rglob("*")) if path.is_file()]
    volatile = [record for record in records if record["path"].split("/")[0] in VOLATILE]
    manifest = {
        "schema": f"{SCHEMA}@{SCHEMA_MAJOR}",
        "files": [record for record in records if record not in volatile],
        **facts,
    }
    data = json_bytes(manifest)
    write_file(root / MANIFEST, data)
    write_file(root / PROVENANCE, json_bytes({**provenance, "files": volatile}))
    return hashlib.sha256(data).hexdigest()


def damaged_files(
    root: Path, records: list[dict[str, Any]], progress: Progress = silent
) -> list[str]:
    """List what differs from the records, one readable line per file."""
    found = []
    for index, record in enumerate(records, 1):
        path = root / record["path"]
        if not path.is_file():
            found.append(f"{record['path']}: missing")
        elif path.stat().st_size != record["bytes"]:
            found.append(
                f"{record['path']}: {path.stat().st_size} bytes, expected {record['bytes']}"
            )
        elif sha256_of(path) != record["sha256"]:
            found.append(f"{record['path']}: content changed")
        progress(index, len(records), record["path"])
    return found


def unlisted_files(root: Path, records: list[dict[str, Any]]) -> list[str]:
    """List files that no record names."""
    listed = {record["path"] for record in records} | {MANIFEST, PROVENANCE}
    files = (
        path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()
    )
    return [path for path in files if path not in listed and path.split("/")[0] not in VOLATILE]


def _no_bundle(root: Path) -> FormatError:
    build = "mbq-export build --model MODEL -o DIR"
    if not root.exists() and partial_path(root).is_dir():
        why, fix = (
            f"its build has not finished: {partial_path(root)}",
            f"run the same {build} again",
        )
    else:
        why, fix = "a bundle is a folder that build has sealed", build
    found = f"{root} has no {MANIFEST}" if root.exists() else f"There is no bundle {root}"
    return FormatError("E4604", f"{found}.", why=why, fix=fix)


def _record(root: Path, path: Path) -> dict[str, Any]:
    if path.is_symlink() or path.stat().st_nlink > 1:
        raise FormatError(
            "E4605",
            f"{path.relative_to(root)} is a link.",
            why="a bundle holds regular files only",
            fix="build into a folder without links",
        )
    relative = path.relative_to(root).as_posix()
    return {"path": relative, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _check_schema(manifest: dict[str, Any]) -> None:
    name, _, major = str(manifest.get("schema", "")).partition("@")
    files = manifest.get("files")
    shaped = isinstance(files, list) and all(_is_record(record) for record in files)
    if name != SCHEMA or not major.isdigit() or not shaped:
        raise FormatError(
            "E4604",
            f"{MANIFEST} has schema {manifest.get('schema')!r} or a malformed file list.",
            why=f"this release reads {SCHEMA}@{SCHEMA_MAJOR}",
            fix="build the bundle again",
        )
    if int(major) > SCHEMA_MAJOR:
        raise IncompatibleError(
            "E7004",
            f"The bundle has schema {major}.",
            why=f"this release reads up to {SCHEMA}@{SCHEMA_MAJOR}",
            fix="use the release of mbq-export that built it",
        )


def _is_record(record: object) -> bool:
    return (
        isinstance(record, dict)
        and isinstance(record.get("path"), str)
        and isinstance(record.get("sha256"), str)
        and isinstance(record.get("bytes"), int)
        and record["bytes"] >= 0
    )


def _check_files(
    root: Path, records: list[dict[str, Any]], *, verify: bool, progress: Progress
) -> None:
    missing = [record["path"] for record in records if not (root / record["path"]).exists()]
    if missing:
        raise FormatError(
            "E4601",
            f"{len(missing)} files of the bundle are missing, the first is {missing[0]}.",
            why="the manifest lists them",
            fix="copy the bundle again, or build it again",
        )
    for record in records:
        contained(root, record["path"], code="E4605")
    wrong_size = [
        record for record in records if (root / record["path"]).stat().st_size != record["bytes"]
    ]
    damaged = damaged_files(root, records if verify else wrong_size, progress)
    if damaged:
        raise FormatError(
            "E4602",
            f"{len(damaged)} files of the bundle changed: {'; '.join(damaged[:5])}.",
            why="size and SHA-256 must be those of the manifest",
            fix="copy the bundle again, or build it again",
        )
