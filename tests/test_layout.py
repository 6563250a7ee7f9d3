"""The tree keeps its promises: tests mirror modules, files stay short, names mean something."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "mbq_export").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
MODULES = [
    *PACKAGE,
    *KERNELS,
    *(path for folder in ("samples", "tests") for path in sorted((ROOT / folder).rglob("*.py"))),
]
LONGEST = 400
LONGER: dict[str, str] = {}  # path -> why it is better in one piece
EMPTY_NAMES = {"utils", "helpers", "common", "misc", "core"}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_module_fits_its_budget(module: Path) -> None:
    lines = module.read_text().count("\n")
    cure = f"{lines} lines; split it along its nouns, or say why in LONGER"
    assert lines <= LONGEST or relative(module) in LONGER, cure


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_module_has_a_name_that_says_something(module: Path) -> None:
    assert module.stem not in EMPTY_NAMES, f"{relative(module)}: name it after what it holds."


@pytest.mark.parametrize("folder", ["kernels", "plugins"])
def test_source_root_is_not_a_package(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/ would shadow another package."


@pytest.mark.parametrize("module", PACKAGE + KERNELS, ids=relative)
def test_module_says_what_it_is(module: Path) -> None:
    assert ast.get_docstring(ast.parse(module.read_text())), f"{relative(module)} has no docstring"


@pytest.mark.parametrize("module", PACKAGE + KERNELS, ids=relative)
def test_module_imports_nothing_that_runs_what_it_reads(module: Path) -> None:
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(module.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not imported & FORBIDDEN_IMPORTS


def test_every_test_file_mirrors_a_module() -> None:
    here = ROOT / "tests"
    expected = {m.relative_to(ROOT / "mbq_export").with_name(f"test_{m.stem}.py") for m in PACKAGE}
    folders = {p.name for p in (ROOT / "mbq_export").iterdir() if p.is_dir()}
    found = {p.relative_to(here) for f in folders for p in (here / f).rglob("test_*.py")}
    assert found <= expected, f"no such module: {sorted(map(str, found - expected))}"
