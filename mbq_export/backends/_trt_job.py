"""What crosses between the tool and the child that holds TensorRT: two JSON files in a private folder."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from mbq_export.writing import json_bytes, write_file

SCHEMA: Final = 1
JOB: Final = "job.json"
RESULT: Final = "result.json"
PLAN: Final = "plan.partial"
TIMES: Final = "timing.cache"
PLUGINS: Final = "./libmbq_trt_plugins.so"
"""The plugin library as the child names it: with a slash, or it would be searched for."""
LOG: Final = "native.log"
STAGE_MARK: Final = "[mbq] stage "
"""Begins the lines in which the child names what it does next."""

Profile = Mapping[str, tuple[tuple[int, ...], ...]]
"""Smallest, typical and largest shape of every input."""


class Refused(Exception):  # noqa: N818  (it is an answer, not an error of ours)
    """TensorRT said no, in the child; the parent turns ``kind`` into an error code."""

    def __init__(self, kind: str, message: str, details: tuple[str, ...] = ()) -> None:
        """Keep the parts."""
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.details = details


@dataclass(frozen=True, kw_only=True)
class Job:
    """One call of TensorRT.

    Attributes:
        op: ``probe``, ``parse``, ``build`` or ``session``.
        workdir: Private folder of the call.
        flavour: Name of the flavour.
        module: Module to import.
        link: Plain name of the library, as the parser opens it; empty where nothing opens it that way.
        library: The file that name must lead to.
        plugins: Plugin library to load, or nothing.
        plugin_layers: Names of the nodes that must become plugin layers, by operator.
        onnx: Graph file, or engine file of a session.
        inputs: Input names of the contract.
        outputs: Output names of the contract.
        shapes: Shape of each input and output, sizes that vary as symbols; for a session.
        profile: Shapes of the single profile.
        cc: Devices to build for, as ``SM89``; none for the GPU of this machine.
        flags: Builder flags, by name.
        workspace_mib: Scratch memory the builder may plan with.
        opt_level: Builder optimization level.
        timing_cache: Whether to read and write `TIMES`.
    """

    op: str
    workdir: Path
    flavour: str
    module: str
    link: str
    library: str
    plugins: str = ""
    plugin_layers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    onnx: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    shapes: Mapping[str, list[Any]] = field(default_factory=dict)
    profile: Profile = field(default_factory=dict)
    cc: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    workspace_mib: int = 1024
    opt_level: int = 3
    timing_cache: bool = False

    def write(self) -> Path:
        """Write it into its folder and return the file."""
        fields = {**asdict(self), "workdir": str(self.workdir), "schema": SCHEMA}
        path = self.workdir / JOB
        write_file(path, json_bytes(fields))
        return path

    @classmethod
    def read(cls, path: Path) -> Self:
        """Undo `write`."""
        fields = json.loads(path.read_bytes())
        fields.pop("schema")
        tuples = {key: tuple(fields[key]) for key in ("inputs", "outputs", "cc", "flags")}
        layers = {op: tuple(names) for op, names in fields["plugin_layers"].items()}
        nested = {"plugin_layers": layers, "workdir": Path(fields["workdir"])}
        return cls(**{**fields, **tuples, **nested})


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a job ended.

    Attributes:
        kind: Empty for success, else which check said no: ``trt-parse``, ``onnx-empty``, ...
        message: One sentence about it.
        details: TensorRT's own words.
        notes: What did not go as asked and is no failure.
        version: Version the library reports.
        devices: Devices it can build for.
        network_layers: Layers after the parse.
        plugin_layers: Plugin layers among them, by operator.
        plan_bytes: Size of the engine.
        parse_s: Seconds of the parse.
        build_s: Seconds of the build.
        peak_rss_bytes: Largest memory of the child.
    """

    kind: str = ""
    message: str = ""
    details: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    version: str = ""
    devices: tuple[str, ...] = ()
    network_layers: int = 0
    plugin_layers: Mapping[str, int] = field(default_factory=dict)
    plan_bytes: int = 0
    parse_s: float = 0.0
    build_s: float = 0.0
    peak_rss_bytes: int = 0

    def having(self, **fields: Any) -> Self:
        """Return a copy with other fields."""
        return dataclasses.replace(self, **fields)

    def write(self, workdir: Path) -> None:
        """Write it, complete or not at all."""
        write_file(workdir / RESULT, json_bytes({**asdict(self), "schema": SCHEMA}))

    @classmethod
    def read(cls, workdir: Path) -> Self | None:
        """Undo `write`; None if there is no result, or none of ours."""
        try:
            fields = json.loads((workdir / RESULT).read_bytes())
            if fields.pop("schema") != SCHEMA:
                return None
            tuples = {key: tuple(fields[key]) for key in ("details", "devices", "notes")}
            return cls(**{**fields, **tuples})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
