"""Small shared libraries that carry the plugins' record, made with gcc in a moment."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from mbq_export.plugin_library import PLUGIN_ABI

RECORD = {"abi": PLUGIN_ABI, "kernel_abi": 1, "layout_version": 1, "trt_headers": "10.14.1"}


def compiled(source: str, out: Path, *flags: str) -> Path:
    """A shared library of one C source."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not on PATH")
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(out), *flags]
    subprocess.run(command, input=source, text=True, check=True, timeout=60)
    return out


def recorded(record: dict[str, object]) -> str:
    """C source of a library whose record is this, and nothing else."""
    text = json.dumps(json.dumps(record))
    return f'__attribute__((used, section(".mbq_plugin"))) const char record[] = {text};\n'


def stand_in(out: Path, **changed: object) -> Path:
    """A library with the right record and no plugins; changed keys make it another."""
    return compiled(recorded({**RECORD, **changed}), out)
