"""Plugins in real TensorRT for RTX builds: found and counted, or the build fails with the reason."""

from dataclasses import replace
from pathlib import Path

import pytest

from mbq_export.backends import _tensorrt
from mbq_export.backends.base import EngineGraph, EngineRecord, EngineRequest
from mbq_export.errors import MbqError
from mbq_export.plugin_library import PluginLibrary
from mbq_export.target import Target
from tests.backends import plugin_graphs

pytestmark = pytest.mark.trt

EMPTY = (
    'extern "C" void* const* getCreators(int& n) { static void* none[1]; n = 0; return none; }\n'
)
FINDER = 'extern "C" void setLoggerFinder(void*) {}\n'


THROWS = """
#include <NvInferRuntime.h>
using namespace nvinfer1;
struct Creator : IPluginCreatorV3One {
    IPluginV3* createPlugin(char const*, PluginFieldCollection const*, TensorRTPhase) noexcept override { throw 1; }
    PluginFieldCollection const* getFieldNames() noexcept override { static PluginFieldCollection none{}; return &none; }
    char const* getPluginName() const noexcept override { return "W3Linear"; }
    char const* getPluginVersion() const noexcept override { return "1"; }
    char const* getPluginNamespace() const noexcept override { return "mbq"; }
};
extern "C" IPluginCreatorInterface* const* getCreators(int& n) {
    static Creator creator;
    static IPluginCreatorInterface* const all[] = {&creator};
    n = 1;
    return all;
}
"""
"""A creator of our name that throws where it must not: the C++ runtime ends the process."""


def build(
    graph: EngineGraph, library: PluginLibrary | None, out: Path, **changes: object
) -> EngineRecord:
    request = EngineRequest(
        graphs=(graph,),
        target=Target.parse("sm89:rtx"),
        out=out / "sm89",
        plugins=library,
        timeout_s=60,
    )
    return _tensorrt.build("rtx", replace(request, **changes))


def refusal(
    graph: EngineGraph, library: PluginLibrary | None, out: Path, **changes: object
) -> MbqError:
    with pytest.raises(MbqError) as error:
        build(graph, library, out, **changes)
    assert not list(out.rglob("*.engine"))
    assert not list(out.glob("*.partial"))
    return error.value


def test_planned_plugins_are_found_by_the_parser_and_in_the_layer_table(tmp_path: Path) -> None:
    graph = plugin_graphs.linears(tmp_path)
    record = build(graph, plugin_graphs.emulated(), tmp_path)
    engine = record.engines["decoder"]
    assert engine.plugin_layers == {"W3Linear": plugin_graphs.LINEARS}
    assert {check.name: check.ok for check in engine.checks}["engine.A1"]
    assert record.failed == ()


def test_second_build_has_the_same_bytes(tmp_path: Path) -> None:
    graph = plugin_graphs.linears(tmp_path)
    hashes = {
        build(graph, plugin_graphs.emulated(), tmp_path / str(run)).engines["decoder"].sha256
        for run in range(2)
    }
    assert len(hashes) == 1


@pytest.mark.parametrize("doctored", [{"plugin_namespace": "trt.plugins"}, {"plugin_version": "2"}])
def test_function_that_wins_over_a_plugin_fails_the_build(
    tmp_path: Path, doctored: dict[str, str]
) -> None:
    """The graph parses and would build: right, slow, and silent about it."""
    graph = plugin_graphs.linears(tmp_path, body=True, **doctored)
    error = refusal(graph, plugin_graphs.emulated(), tmp_path)
    assert (error.code, error.exit_status) == ("E6004", 6)
    assert "has 1 of 2 planned plugin layers" in error.message
    assert "no plugin: layers.1.o_proj" in error.message


def test_plugin_of_another_version_without_a_function_is_refused_by_the_parser(
    tmp_path: Path,
) -> None:
    graph = plugin_graphs.linears(tmp_path, plugin_version="2")
    error = refusal(graph, plugin_graphs.emulated(), tmp_path)
    assert error.code == "E6001"
    assert "Plugin not found" in error.message
    assert "layers.1.o_proj" in error.message


def test_plugin_that_nobody_planned_is_refused(tmp_path: Path) -> None:
    graph = plugin_graphs.linears(tmp_path)
    short = replace(graph, plugin_layers={"W3Linear": graph.plugin_layers["W3Linear"][:1]})
    error = refusal(short, plugin_graphs.emulated(), tmp_path)
    assert error.code == "E6004"
    assert "not planned: layers.1.o_proj" in error.message


@pytest.mark.parametrize(
    ("doctored", "words"),
    [
        ({"N": 48}, "input 1 has rank 3 and size 2 first, expected rank 3 and 3"),
        ({"K": 256}, "K=256"),
        ({"bits": 4}, "bits"),
        ({"group_size": 48}, "the group size is not one of the scheme's"),
        ({"layout_version": 9}, "tiles of layout version 9, this library reads 1"),
    ],
)
def test_plugin_that_refuses_fails_the_build_in_its_own_words(
    tmp_path: Path, doctored: dict[str, int], words: str
) -> None:
    graph = plugin_graphs.linears(tmp_path, **doctored)
    error = refusal(graph, plugin_graphs.emulated(), tmp_path)
    assert error.code in {"E6001", "E6002"}
    assert error.exit_status == 6
    assert words in error.message


def test_missing_field_is_no_default(tmp_path: Path) -> None:
    graph = plugin_graphs.linears(tmp_path, dropped=("group_size",))
    assert refusal(graph, plugin_graphs.emulated(), tmp_path).code == "E6001"


def test_library_that_vanished_is_named(tmp_path: Path) -> None:
    gone = replace(plugin_graphs.emulated(), path=tmp_path / "gone.so")
    error = refusal(plugin_graphs.linears(tmp_path), gone, tmp_path)
    assert (error.code, error.exit_status) == ("E3005", 3)
    assert "gone.so has changed or gone" in error.message


def test_truncated_library_is_not_loaded(tmp_path: Path) -> None:
    whole = plugin_graphs.emulated().path.read_bytes()
    (tmp_path / "short.so").write_bytes(whole[: len(whole) // 2])
    short = plugin_graphs.stand_in(tmp_path / "short.so")
    error = refusal(plugin_graphs.linears(tmp_path), short, tmp_path)
    assert error.code in {"E3005", "E6003"}
    assert error.context["logs"]


def test_library_without_the_second_export_is_not_loaded(tmp_path: Path) -> None:
    library = plugin_graphs.other_library(tmp_path, EMPTY)
    error = refusal(plugin_graphs.linears(tmp_path), library, tmp_path)
    assert error.code == "E3005"
    assert "setLoggerFinder" in error.message


def test_library_without_creators_is_not_loaded(tmp_path: Path) -> None:
    library = plugin_graphs.other_library(tmp_path, EMPTY + FINDER)
    assert refusal(plugin_graphs.linears(tmp_path), library, tmp_path).code == "E3005"


def test_operator_without_a_creator_is_named(tmp_path: Path) -> None:
    graph = replace(plugin_graphs.linears(tmp_path), plugin_layers={"W9Linear": ("fc",)})
    error = refusal(graph, plugin_graphs.emulated(), tmp_path)
    assert (error.code, error.exit_status) == ("E7003", 7)
    assert "has no creator of W9Linear" in error.message
    assert "mbq::1::W3Linear" in error.message


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ('extern "C" void* const* getCreators(int&) { throw 1; }\n', "E3005"),
        ('#include <csignal>\nextern "C" void* const* getCreators(int&) { raise(SIGSEGV); return 0; }\n', "E6003"),
        ('#include <csignal>\nextern "C" void* const* getCreators(int&) { raise(SIGKILL); return 0; }\n', "E5004"),
    ],
    ids=["throws", "segfaults", "killed"],
)  # fmt: skip
def test_library_that_takes_the_child_down_is_an_ordinary_error(
    tmp_path: Path, code: str, expected: str
) -> None:
    library = plugin_graphs.other_library(tmp_path, code + FINDER)
    error = refusal(plugin_graphs.linears(tmp_path), library, tmp_path)
    assert error.code == expected
    assert "plugin" in error.message


def test_library_that_hangs_is_ended(tmp_path: Path) -> None:
    code = (
        '#include <unistd.h>\nextern "C" void* const* getCreators(int&) { sleep(600); return 0; }\n'
    )
    library = plugin_graphs.other_library(tmp_path, code + FINDER)
    error = refusal(plugin_graphs.linears(tmp_path), library, tmp_path, timeout_s=3)
    assert (error.code, error.exit_status) == ("E5006", 5)
    assert "still in plugins after 3 s" in error.message


def test_creator_that_throws_ends_the_child_and_nothing_else(tmp_path: Path) -> None:
    library = plugin_graphs.other_library(tmp_path, THROWS + FINDER)
    error = refusal(plugin_graphs.linears(tmp_path), library, tmp_path)
    assert (error.code, error.exit_status) == ("E6003", 6)
    assert "died of SIGABRT in parse" in error.message
    assert "after throwing" in error.why
