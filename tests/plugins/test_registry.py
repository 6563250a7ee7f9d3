"""The plugin registries of TensorRT, each in a child: what loads, what creators make, what is refused.

Both majors install the same Python module, so the second lies in a folder of its own:
``pip install --no-deps --target build/lean-11 tensorrt-lean-cu13-bindings==11.4.0.106``
"""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest

from mbq_export.errors import FormatError
from mbq_export.plugin_library import read_plugin_library
from tests.plugins import compiled

pytestmark = pytest.mark.trt

FOLDERS: Final = {"10": compiled.ROOT / "build/lean-10", "11": compiled.ROOT / "build/lean-11"}
OPS: Final = ("W3Linear", "W4A16Linear", "W4A8Linear")
GOOD: Final = {
    "N": 48, "K": 256, "group_size": 128, "bits": 3, "layout_version": 1, "has_bias": 0, "epilogue": 0,
    "act_bits": 16,
}  # fmt: skip

PRELUDE: Final = """
import json, os, sys
import numpy as np
import tensorrt_lean_bindings as trt

def say(found):
    print(json.dumps(found), flush=True)
    os._exit(0)  # the registry crashes when the interpreter ends in its own way

registry = trt.get_plugin_registry()
library = registry.load_library(sys.argv[1])
"""


def child(script: str, library: Path, folder: Path | None) -> subprocess.CompletedProcess[str]:
    """Run a script in which the library was given to the registry."""
    path = os.pathsep.join(filter(None, [str(folder or ""), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "MBQ_PLUGIN_LOG": "1"}
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(script), library]
    return compiled.run(command, env=environment, timeout=100)


@cache
def installed() -> dict[str, Path | None]:
    """Majors of the lean registries on this machine, and the folder of each; None is this environment's."""
    places: list[Path | None] = [folder for folder in FOLDERS.values() if folder.is_dir()]
    if importlib.util.find_spec("tensorrt_lean_bindings"):
        places.append(None)
    found: dict[str, Path | None] = {}
    for place in places:
        path = os.pathsep.join(filter(None, [str(place or ""), os.environ.get("PYTHONPATH", "")]))
        asked = compiled.run(
            [sys.executable, "-c", "import tensorrt_lean_bindings as t; print(t.__version__)"],
            env={**os.environ, "PYTHONPATH": path},
            timeout=60,
        )
        found.setdefault(asked.stdout.partition(".")[0], place)
    return found


@pytest.fixture(params=["10", "11"])
def lean(request: pytest.FixtureRequest) -> Path | None:
    """Folder of the registry of one major."""
    if request.param not in installed():
        pytest.skip(f"TensorRT-lean {request.param} is not installed: see this file's docstring")
    return installed()[request.param]


def asked(script: str, library: Path, lean: Path | None) -> Any:
    outcome = child(script, library, lean)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return json.loads(outcome.stdout.splitlines()[-1])


def test_the_registry_lists_three_creators_with_integer_fields(lean: Path | None) -> None:
    found = asked(
        """
        creators = [registry.get_creator(name, "1", "mbq") for name in ("W3Linear", "W4A16Linear", "W4A8Linear")]
        say([[c.name, c.plugin_version, c.plugin_namespace, c.interface_info.kind,
              [[f.name, f.type == trt.PluginFieldType.INT32] for f in c.field_names]] for c in creators])
        """,
        compiled.emulated_library(),
        lean,
    )
    fields = [[name, True] for name in GOOD]
    assert found == [[op, "1", "mbq", "PLUGIN CREATOR_V3ONE", fields] for op in OPS]


def test_another_namespace_or_version_has_no_creator(lean: Path | None) -> None:
    found = asked(
        """
        wanted = [("W3Linear", "1", ""), ("W3Linear", "2", "mbq"), ("W5Linear", "1", "mbq")]
        say([registry.get_creator(*each) is None for each in wanted])
        """,
        compiled.emulated_library(),
        lean,
    )
    assert found == [True, True, True]


CREATE = """
    creator = registry.get_creator("W3Linear", "1", "mbq")
    kept = []  # the registry's fields point into these arrays

    def plugin(phase=trt.TensorRTPhase.BUILD, without=(), **changed):
        values = {**GOOD, **changed}
        fields = []
        for name, value in values.items():
            if name in without:
                continue
            array = np.asarray(value if isinstance(value, np.ndarray) else [value])
            array = array if isinstance(value, np.ndarray) else array.astype(np.int32)
            kept.append(array)
            kinds = {"i": trt.PluginFieldType.INT32, "f": trt.PluginFieldType.FLOAT32}
            fields.append(trt.PluginField(name, array, kinds[array.dtype.kind]))
        return creator.create_plugin("node", trt.PluginFieldCollection(fields), phase)
"""


def test_a_created_plugin_has_all_three_capabilities(lean: Path | None) -> None:
    found = asked(
        f"GOOD = {GOOD}\n{textwrap.dedent(CREATE)}"
        + textwrap.dedent("""
        made = plugin()
        kinds = trt.PluginCapabilityType
        core, build, runtime = (made.get_capability_interface(k) for k in (kinds.CORE, kinds.BUILD, kinds.RUNTIME))
        say([core.plugin_name, core.plugin_version, core.plugin_namespace, build.num_outputs, runtime is not None])
        """),
        compiled.emulated_library(),
        lean,
    )
    assert found == ["W3Linear", "1", "mbq", 1, True]


def test_bad_fields_make_no_plugin(lean: Path | None) -> None:
    found = asked(
        f"GOOD = {GOOD}\n{textwrap.dedent(CREATE)}"
        + textwrap.dedent("""
        run = trt.TensorRTPhase.RUNTIME
        say({
            "good": plugin() is not None,
            "engine": plugin(run, abi=1) is not None,
            "engine without abi": plugin(run) is None,
            "engine of another abi": plugin(run, abi=2) is None,
            "missing": plugin(without=("K",)) is None,
            "length 2": plugin(N=np.array([48, 48], np.int32)) is None,
            "float": plugin(N=np.array([48.0], np.float32)) is None,
            "K no multiple of 8": plugin(K=100) is None,
            "group": plugin(group_size=96) is None,
            "bits of another op": plugin(bits=4) is None,
            "newer layout": plugin(layout_version=2) is None,
        })
        """),
        compiled.emulated_library(),
        lean,
    )
    assert found
    assert all(found.values()), found


@pytest.mark.slow
@pytest.mark.nvcc
def test_the_compiled_library_loads_too(lean: Path | None) -> None:
    found = asked(
        'say(registry.get_creator("W3Linear", "1", "mbq") is not None)',
        compiled.cuda_library(),
        lean,
    )
    assert found is True


@pytest.mark.parametrize("defect", ["no-logger-finder", "throws", "null-creators"])
def test_a_library_that_registries_refuse_is_none_to_them(lean: Path | None, defect: str) -> None:
    """Why the worker has to look at what ``load_library`` returns."""
    library = compiled.defective_library(defect)
    assert asked("say(library is None)", library, lean) is True


@pytest.mark.parametrize("damage", ["text", "other processor"])
def test_a_file_that_is_no_library_is_none_to_registries(
    lean: Path | None, damage: str, tmp_path: Path
) -> None:
    data = compiled.defective_library("none").read_bytes()
    bad = {
        "text": b"no library",
        "other processor": data[:18] + b"\xb7\x00" + data[20:],
    }
    (tmp_path / "bad.so").write_bytes(bad[damage])
    assert asked("say(library is None)", tmp_path / "bad.so", lean) is True


@pytest.mark.parametrize(("defect", "status"), [("crashes", -11), ("undefined-symbol", 127)])
def test_a_library_that_dies_takes_only_the_child_along(
    lean: Path | None, defect: str, status: int
) -> None:
    """Registries bind symbols when they are called: one that is missing ends the process there."""
    outcome = child("say(True)", compiled.defective_library(defect), lean)
    assert outcome.returncode == status
    assert outcome.stdout == ""


def test_a_truncated_library_kills_the_child_and_is_refused_before(
    lean: Path | None, tmp_path: Path
) -> None:
    """The loader maps what is not there: why every library is read before it is loaded."""
    cut = tmp_path / "cut.so"
    data = compiled.defective_library("none").read_bytes()
    cut.write_bytes(data[: len(data) // 4])
    assert child("say(True)", cut, lean).returncode == -7
    with pytest.raises(FormatError, match="is no shared library") as caught:
        read_plugin_library(cut, found="--plugin-lib")
    assert "truncated" in caught.value.why


def test_a_library_of_another_namespace_loads_and_has_no_creator_of_ours(lean: Path | None) -> None:
    """Why the worker has to ask for the creators by name after a library was loaded."""
    found = asked(
        'say([library is None, registry.get_creator("W3Linear", "1", "mbq") is None])',
        compiled.defective_library("other-namespace"),
        lean,
    )
    assert found == [False, True]


def test_a_creator_that_throws_takes_only_the_child_along(lean: Path | None) -> None:
    script = f"GOOD = {GOOD}\n{textwrap.dedent(CREATE)}\nplugin()\nsay(True)"
    outcome = child(script, compiled.defective_library("creator-throws"), lean)
    assert outcome.returncode == -6
    assert "planted" in outcome.stderr
