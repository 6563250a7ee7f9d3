"""The form of engines and the library it needs: found, refused, or replaced with the reason."""

import json
import logging
from pathlib import Path

import pytest

from mbq_export.errors import MbqError
from mbq_export.pipeline.plugins import EngineForm, engine_form, pack_library
from mbq_export.plugin_library import bundle_folder, find_plugin_library
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL
from mbq_export.target import Target
from tests.backends import plugin_graphs

CARD = Target.parse("rtx4090:rtx")
OLD = Target.parse("sm80:rtx")


def form(
    asked: str,
    named: Path | None = None,
    *,
    scheme: str = "w3a16",
    group_size: int = 128,
    built: tuple[Target, ...] = (CARD,),
) -> EngineForm:
    return engine_form(
        asked,
        targets=(CARD,),
        scheme=SCHEMES[scheme],
        group_size=group_size,
        built=built,
        named=named,
    )


def refusal(asked: str, named: Path | None = None, **changes: object) -> MbqError:
    with pytest.raises(MbqError) as error:
        form(asked, named, **changes)
    return error.value


def test_auto_without_a_library_takes_standard_operators_and_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        found = form("auto")
    assert (found.lowering, found.library) == ("qdq", None)
    assert "no compiled plugin library" in found.reason
    assert "mbq-export plugins build --target sm89" in found.reason
    assert found.reason in caplog.text


def test_plugins_that_were_asked_for_are_not_replaced() -> None:
    error = refusal("plugin")
    assert (error.code, error.exit_status) == ("E3005", 3)


def test_format_without_another_form_is_not_replaced() -> None:
    assert refusal("auto", scheme="w4a8").code == "E3005"
    assert form("auto", scheme="w4a8", group_size=CHANNEL).lowering == "qdq"


def test_library_that_is_named_and_no_library_is_an_error_even_for_auto(tmp_path: Path) -> None:
    (tmp_path / "no.so").write_text("text")
    assert refusal("auto", tmp_path / "no.so").code == "E4701"
    assert refusal("auto", tmp_path / "missing.so").code == "E4701"


def test_no_library_is_searched_where_no_engine_is_built() -> None:
    assert form("plugin", built=()) == EngineForm(lowering="plugin")


def test_library_without_code_for_a_target_is_incompatible() -> None:
    error = refusal("plugin", plugin_graphs.emulated().path)
    assert (error.code, error.exit_status) == ("E7008", 7)


@pytest.mark.nvcc
@pytest.mark.slow
def test_named_library_serves_its_devices_and_no_older_ones() -> None:
    library = plugin_graphs.library()
    assert form("auto", library.path) == EngineForm(lowering="plugin", library=library)
    error = refusal("plugin", library.path, built=(OLD,))
    assert (error.code, error.exit_status) == ("E7008", 7)
    assert "sm80" in error.message


def test_packed_library_is_found_in_the_bundle(tmp_path: Path) -> None:
    library = plugin_graphs.emulated()
    folder = pack_library(library, tmp_path)
    assert folder == tmp_path / bundle_folder()
    found = find_plugin_library(bundle=tmp_path, sha256=library.sha256)
    assert (found.found, found.sha256) == ("bundle", library.sha256)
    record = json.loads((folder / "plugin.json").read_text())
    assert record["abi"] == library.abi
    assert str(tmp_path) not in (folder / "plugin.json").read_text()


def test_library_that_was_exchanged_in_the_bundle_is_refused(tmp_path: Path) -> None:
    folder = pack_library(plugin_graphs.emulated(), tmp_path)
    with (folder / "libmbq_trt_plugins.so").open("ab") as file:
        file.write(b"x")
    with pytest.raises(MbqError) as error:
        find_plugin_library(bundle=tmp_path)
    assert error.value.code == "E4602"
