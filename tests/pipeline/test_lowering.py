"""The form that engines are built from: asked for, or the best that every builder reads."""

from dataclasses import replace
from pathlib import Path

import pytest

from mbq_export.backends import BACKENDS
from mbq_export.backends.base import Backend
from mbq_export.errors import UsageError
from mbq_export.export import GraphForm
from mbq_export.export.lowerings import LOWERINGS
from mbq_export.pipeline import lowering as module
from mbq_export.pipeline.lowering import engine_lowering
from mbq_export.pipeline.plan import make_plan
from mbq_export.pipeline.request import BuildRequest
from mbq_export.pipeline.stages import graph_forms
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL
from mbq_export.target import Target

CARD = Target.parse("rtx4090:rtx")
W3, W4A8 = SCHEMES["w3a16"], SCHEMES["w4a8"]


class Builders:
    """Backends by flavour, reading other lowerings than today's: what the choice asks of the registry."""

    def __init__(self, **lowerings: tuple[str, ...]) -> None:
        self.lowerings = lowerings

    def __getitem__(self, flavour: str) -> Backend:
        return replace(BACKENDS["rtx"], lowerings=self.lowerings[flavour])


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT for RTX reads plugins first, whatever this release's backend says."""
    monkeypatch.setattr(module, "BACKENDS", Builders(rtx=("plugin", "qdq")))


@pytest.fixture
def standard(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT for RTX reads standard operators only."""
    monkeypatch.setattr(module, "BACKENDS", Builders(rtx=("qdq",)))


@pytest.mark.usefixtures("plugins")
def test_the_best_form_that_the_builder_reads_is_taken() -> None:
    assert engine_lowering("auto", targets=[CARD], scheme=W3, group_size=128) == "plugin"
    assert engine_lowering("qdq", targets=[CARD], scheme=W3, group_size=128) == "qdq"
    assert engine_lowering("auto", targets=[CARD], scheme=None, group_size=CHANNEL) == "qdq"


@pytest.mark.usefixtures("standard")
def test_a_builder_without_plugins_gets_standard_operators() -> None:
    assert engine_lowering("auto", targets=[CARD], scheme=W3, group_size=128) == "qdq"
    with pytest.raises(UsageError, match="is built from the plugin lowering here") as caught:
        engine_lowering("plugin", targets=[CARD], scheme=W3, group_size=128)
    assert caught.value.code == "E2002"
    assert caught.value.why == "the builders of these targets read: qdq"


def test_the_form_is_one_that_all_builders_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKENDS", Builders(rtx=("plugin", "qdq"), trt=("qdq",)))
    targets = [CARD, replace(CARD, flavour="trt")]
    assert engine_lowering("auto", targets=targets, scheme=W3, group_size=128) == "qdq"


@pytest.mark.usefixtures("plugins")
def test_groups_of_rounded_activations_are_for_plugins() -> None:
    assert engine_lowering("auto", targets=[CARD], scheme=W4A8, group_size=128) == "plugin"
    with pytest.raises(UsageError, match="has no qdq form") as caught:
        engine_lowering("qdq", targets=[CARD], scheme=W4A8, group_size=128)
    assert caught.value.code == "E2006"


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize("name", ["w8a8", "w8a16"])
def test_formats_of_8_bits_have_no_plugin_and_say_what_they_have(name: str) -> None:
    scheme = SCHEMES[name]
    assert engine_lowering("auto", targets=[CARD], scheme=scheme, group_size=CHANNEL) == "qdq"
    with pytest.raises(UsageError, match=f"there is no plugin for {name}") as caught:
        engine_lowering("plugin", targets=[CARD], scheme=scheme, group_size=CHANNEL)
    assert (caught.value.code, caught.value.fix) == ("E2002", ("--lowering auto",))


def test_without_a_target_only_plugins_are_written_for_a_device_to_come() -> None:
    for asked, wanted in (("auto", None), ("qdq", None), ("plugin", "plugin")):
        assert engine_lowering(asked, targets=[], scheme=W3, group_size=128) == wanted


def test_plugins_of_nothing_and_unknown_forms_are_refused() -> None:
    with pytest.raises(UsageError, match="nothing is quantized") as caught:
        engine_lowering("plugin", targets=[], scheme=None, group_size=CHANNEL)
    assert caught.value.code == "E2002"
    with pytest.raises(UsageError, match="from no lowering 'reference'") as caught:
        engine_lowering("reference", targets=[], scheme=W3, group_size=128)
    assert caught.value.why == "known: auto, plugin, qdq"


def test_forms_of_engines_exist_and_are_read_by_a_backend() -> None:
    assert set(module.ENGINE_FORMS) <= set(LOWERINGS.members())
    for backend in BACKENDS.members().values():
        assert set(backend.lowerings) <= set(LOWERINGS.members())


def test_a_plan_writes_the_plugin_graph_that_was_asked_for(tmp_path: Path) -> None:
    request = BuildRequest(
        model="tiny-llava-ov", out=tmp_path / "out", samples=4, targets=("cpu",), lowering="plugin"
    )
    plan = make_plan(request)
    assert plan.fingerprint["graphs"]["lowering"] == "plugin"  # type: ignore[index]
    assert graph_forms(plan)[-1] == GraphForm(
        lowering="plugin", target="trt", dtype="fp16", kv="static", logits="last", max_context=512
    )
    without = make_plan(replace(request, lowering="auto"))
    assert without.lowering is None
    assert without.fingerprint != plan.fingerprint
