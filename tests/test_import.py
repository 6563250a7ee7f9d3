"""Importing is free: no heavy library for --help, nothing done on import."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "triton",
    "fastapi",
    "PIL",
}
COMMANDS = [
    "build",
    "calibrate",
    "quantize",
    "export",
    "validate",
    "run",
    "bench",
    "report",
    "inspect",
    "doctor",
    "models",
    "explain",
]


def loaded_by(code: str) -> set[str]:
    script = f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=60,
    )
    return {name.split(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_no_heavy_library(command: str) -> None:
    code = f"from mbq_export.commands import main\ntry:\n    main([{command!r}, '--help'] if {command!r} else ['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0"
    assert not loaded_by(code) & HEAVY


def test_package_import_loads_nothing_but_itself() -> None:
    assert not loaded_by("import mbq_export") & (HEAVY | {"numpy", "typer"})


def test_method_and_lowering_contracts_list_every_member() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    independent = {c["name"]: set(c["modules"]) for c in contracts if c["type"] == "independence"}
    for name, folder, shared in [
        ("Schemes do not know each other", "schemes", {"base", "affine", "oracle"}),
        ("Methods do not know each other", "calibrate/methods", {"base"}),
        ("Lowerings do not know each other", "export/lowerings", {"base"}),
    ]:
        members = {
            f"mbq_export.{folder.replace('/', '.')}.{path.stem}"
            for path in (ROOT / "mbq_export" / folder).glob("*.py")
            if path.stem not in shared and not path.stem.startswith("_")
        }
        assert independent[name] == members
