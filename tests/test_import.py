"""Importing is free: no heavy library for --help, nothing done on import."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIGHT = {
    "annotated_doc",
    "annotated_types",
    "click",
    "markdown_it",
    "mbq_export",
    "mdurl",
    "pydantic",
    "pydantic_core",
    "pygments",
    "rich",
    "shellingham",
    "typer",
    "typing_extensions",
    "typing_inspection",
}
"""What a command's help may load beside the standard library: the CLI's own dependencies."""
HELP_MODULES = 500
"""Modules a command's help may load: 439 today. Its time follows from them (about 0.3 s), and a
count does not depend on how busy or how fast a machine is."""
COMMANDS = sorted(
    path.stem
    for path in (ROOT / "mbq_export" / "commands").glob("*.py")
    if "def command(" in path.read_text()
)


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
    return set(json.loads(done.stderr.splitlines()[-1]))


def roots(modules: set[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


def third_party(modules: set[str]) -> set[str]:
    known = {*sys.stdlib_module_names, "__main__", "sitecustomize"}
    return {name for name in roots(modules) - known if not name.startswith("_")}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_the_command_line_s_own_libraries_only(command: str) -> None:
    line = [command, "--help"] if command else ["--help"]
    code = f"from mbq_export.commands import main\ntry:\n    main({line!r})\nexcept SystemExit as stop:\n    assert stop.code == 0"
    loaded = loaded_by(code)
    assert third_party(loaded) <= LIGHT
    assert len(loaded) <= HELP_MODULES


def test_the_commands_are_found() -> None:
    assert {"build", "plugins", "explain"} <= set(COMMANDS)


def test_package_import_loads_nothing_but_itself() -> None:
    assert third_party(loaded_by("import mbq_export")) == {"mbq_export"}


def test_method_and_lowering_contracts_list_every_member() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    independent = {c["name"]: set(c["modules"]) for c in contracts if c["type"] == "independence"}
    for name, folder, shared in [
        ("Schemes do not know each other", "schemes", {"base", "affine", "integers", "oracle"}),
        ("Methods do not know each other", "calibrate/methods", {"base"}),
        ("Lowerings do not know each other", "export/lowerings", {"base"}),
    ]:
        members = {
            f"mbq_export.{folder.replace('/', '.')}.{path.stem}"
            for path in (ROOT / "mbq_export" / folder).glob("*.py")
            if path.stem not in shared and not path.stem.startswith("_")
        }
        assert independent[name] == members
