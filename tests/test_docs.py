"""Documents are part of the program: links lead somewhere, commands run, figures are on record."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from mbq_export.commands import PANELS
from tests.command_line import PROGRAM, ROOT
from tests.plugins import compiled

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("*/README.md"),
        *ROOT.glob("samples/*/README.md"),
    ]
)
LINK = re.compile(r"\[[^\]]*\]\(([^)#]+)(?:#[^)]*)?\)")
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
COMMAND_TIMEOUT_S = 600


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_files(page: Path) -> None:
    links = [
        link for link in LINK.findall(page.read_text()) if not link.startswith(("http", "mailto:"))
    ]
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_page_names_only_existing_commands(page: Path) -> None:
    named = re.findall(r"(?:^|`|\$ )mbq-export ([a-z]+)\b", page.read_text(), re.MULTILINE)
    assert set(named) <= set(PANELS)


@pytest.mark.slow
@pytest.mark.timeout(3 * COMMAND_TIMEOUT_S)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=page_id
)
def test_commands_of_a_page_run_in_order(page: Path, tmp_path: Path) -> None:
    """Run every `$ mbq-export ...` line of a page's console blocks, in one empty folder."""
    places = {"MBQ_EXPORT_CACHE": str(tmp_path / "cache")}
    if "plugins build" in page.read_text():
        places["TENSORRT_INCLUDE_DIR"] = str(compiled.tensorrt_headers())
    lines = [
        line[2:]
        for block in BLOCK.findall(page.read_text())
        for line in block.splitlines()
        if line.startswith("$ mbq-export")
    ]
    for line in lines:
        words = shlex.split(line.replace("\\\n", " "), comments=True)[1:]
        words = [str(ROOT / word) if word.startswith("samples/") else word for word in words]
        done = subprocess.run(
            [*PROGRAM, *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
            env=os.environ | places,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
