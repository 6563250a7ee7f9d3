"""A model becomes a checkpoint: same function before rounding, same bytes however often it was killed."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mbq_export.backends.torch import fake_quant_model
from mbq_export.channel_scales import ChannelScales, Switches
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import FormatError, ResourceError, UsageError
from mbq_export.export.ops import OPS
from mbq_export.families.base import LoadedModel
from mbq_export.quantize import quantize
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.integers import signed_codes
from mbq_export.schemes.oracle import dequantized
from mbq_export.state import State
from tests.tiny import Tiny, load_tiny, random_scales, tiny_checkpoint, write_tiny

FOLDED_RELATIVE = 1e-5
"""Folding is exact but for float32 rounding of two multiplications per weight (METHODS, golden E6)."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(tmp_path_factory.mktemp("tiny") / "model", Tiny(tied=False))


def logits(model: LoadedModel) -> torch.Tensor:
    ids = torch.arange(4, 44).reshape(2, 20)
    with torch.no_grad():
        found: torch.Tensor = model.module(input_ids=ids).logits
    return found


def test_checkpoint_without_codes_computes_what_the_model_computes(
    model: LoadedModel, tmp_path: Path
) -> None:
    folded = fake_quant_model(tiny_checkpoint(tmp_path / "none", model, scheme=None))
    wanted = logits(model)
    assert float((logits(folded) - wanted).norm() / wanted.norm()) <= FOLDED_RELATIVE


def test_folded_scales_make_other_codes_than_none(model: LoadedModel, tmp_path: Path) -> None:
    plain = ChannelScales(
        scales={}, sensitivity={}, calib={"switches": Switches(method="rtn").resolved()}
    )
    rtn = quantize(model, plain, scheme=SCHEMES["w3a16"], group_size=64, out=tmp_path / "rtn")
    mbq = tiny_checkpoint(tmp_path / "mbq", model)
    name = rtn.linears[0]
    assert (rtn.packed(name).words != mbq.packed(name).words).any()
    assert rtn.info["method"]["name"] == "rtn"


@pytest.mark.parametrize(
    ("scheme", "group_size"),
    [(name, size) for name in OPS for size in SCHEMES[name].group_sizes],
)
def test_every_scheme_and_group_size_reads_back_near_the_folded_weight(
    model: LoadedModel, tmp_path: Path, scheme: str, group_size: int
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "c", model, scheme=scheme, group_size=group_size)
    none = tiny_checkpoint(tmp_path / "n", model, scheme=None)
    for name in checkpoint.linears:
        packed = checkpoint.packed(name)
        weight = none.tensor(f"{name}.weight").astype(np.float64)
        steps = np.repeat(packed.scales.astype(np.float64), packed.k // packed.groups, axis=1)
        # Half a step, and what rounding the scale to fp16 costs at the far end (FORMATS 1.2).
        bound = (0.5 + (2**packed.bits - 1) * 2**-11) * steps
        assert (np.abs(dequantized(packed) - weight) <= bound).all()


def test_metadata_says_what_was_done(model: LoadedModel, tmp_path: Path) -> None:
    info = tiny_checkpoint(tmp_path / "c", model, scheme="w4a16", group_size=32).info
    assert info["schema"] == "mbq-export/checkpoint@1"
    assert info["model"]["family"] == "llava_onevision"
    assert info["model"]["architecture"] == "LlavaOnevisionForConditionalGeneration"
    assert info["scheme"] == {
        "name": "w4a16", "bits": 4, "group_size": 32, "symmetric": False,
        "rounding": "half_even", "scale_dtype": "float16", "activation": None,
    }  # fmt: skip
    assert info["method"]["name"] == "mbq"
    assert info["method"]["rounding"] == "nearest"
    assert info["tied"] == {}
    skipped = {row["pattern"]: row["modules"] for row in info["skipped"]}
    assert skipped["lm_head"] == 1
    assert skipped["model.multi_modal_projector.*"] == 2
    assert skipped["model.vision_tower.*"] == 8


def test_source_hash_tells_models_apart_and_not_their_folders(
    model: LoadedModel, tmp_path: Path
) -> None:
    def found(loaded: LoadedModel, name: str) -> str:
        source: str = tiny_checkpoint(tmp_path / name, loaded).info["model"]["source_sha256"]
        return source

    again = load_tiny(tmp_path / "again", Tiny(tied=False))
    wider = load_tiny(tmp_path / "wider", Tiny(tied=False, seed=1))
    assert found(model, "a") == found(again, "b")
    assert found(model, "a") != found(wider, "c")


def test_streamed_model_gives_the_same_bytes(model: LoadedModel, tmp_path: Path) -> None:
    streamed = model.family.load(model.folder, meta_blocks=True)
    tiny_checkpoint(tmp_path / "a", model)
    tiny_checkpoint(tmp_path / "b", streamed)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_progress_counts_blocks(model: LoadedModel, tmp_path: Path) -> None:
    heard: list[tuple[int, int, str]] = []
    quantize(
        model,
        random_scales(model),
        scheme=SCHEMES["w3a16"],
        group_size=64,
        out=tmp_path / "c",
        progress=lambda done, total, note="": heard.append((done, total, note)),
    )
    assert [(done, total) for done, total, _ in heard] == [(1, 2), (2, 2)]
    assert heard[0][2].startswith("rel. error 0.")


def test_group_size_that_does_not_divide_names_the_linear_and_what_fits(tmp_path: Path) -> None:
    odd = load_tiny(tmp_path / "model", Tiny(intermediate=192))
    with pytest.raises(UsageError, match="128 does not divide in_features 192") as caught:
        tiny_checkpoint(tmp_path / "c", odd, group_size=128)
    assert caught.value.code == "E2004"
    assert caught.value.where == ["model.language_model.layers.0.mlp.down_proj"]
    assert caught.value.fix == ("--group-size 64", "--group-size 32")
    assert not (tmp_path / "c").exists()


def test_group_size_that_the_scheme_lacks_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="w4a8 has no groups of 64") as caught:
        tiny_checkpoint(tmp_path / "c", model, scheme="w4a8", group_size=64)
    assert caught.value.code == "E2004"
    assert caught.value.fix == ("--group-size channel", "--group-size 128")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("group_size", SCHEMES["w4a8"].group_sizes)
def test_symmetric_codes_are_those_of_the_formula(
    model: LoadedModel, tmp_path: Path, group_size: int
) -> None:
    """s = max(max |w|, 1e-5) / 7 in float32, or fp16 of max |w| / 7 in groups; q = rint(w / s)."""
    found = tiny_checkpoint(tmp_path / "c", model, scheme="w4a8", group_size=group_size)
    none = tiny_checkpoint(tmp_path / "n", model, scheme=None)
    for name in found.linears:
        packed = found.packed(name)
        weight = none.tensor(f"{name}.weight").astype(np.float32)
        grouped = weight.reshape(packed.n, packed.groups, -1)
        largest = np.abs(grouped).max(-1)
        dtype = np.float16 if group_size else np.float32
        scales = (np.maximum(largest, np.float32(1e-5)) / np.float32(7)).astype(dtype)
        np.testing.assert_array_equal(packed.scales, scales)
        q = np.rint(grouped / scales[..., None].astype(np.float32)).reshape(weight.shape)
        np.testing.assert_array_equal(signed_codes(packed), q)
        assert np.abs(q).max() == 7


@pytest.mark.parametrize(("group_size", "dtype"), [(0, "float32"), (128, "float16")])
def test_metadata_says_how_activations_are_rounded(
    model: LoadedModel, tmp_path: Path, group_size: int, dtype: str
) -> None:
    found = tiny_checkpoint(tmp_path / "c", model, scheme="w4a8", group_size=group_size)
    assert found.info["scheme"] == {
        "name": "w4a8", "bits": 4, "group_size": group_size, "symmetric": True,
        "rounding": "half_even", "scale_dtype": dtype,
        "activation": {"bits": 8, "granularity": "token", "symmetric": True, "dynamic": True},
    }  # fmt: skip
    assert found.config["quantization_config"]["sym"] is True
    assert found.config["quantization_config"]["group_size"] == group_size


def test_scales_of_a_deeper_model_are_refused(model: LoadedModel, tmp_path: Path) -> None:
    deep = ChannelScales(
        scales={"layers.2.qkv.e": np.ones(128, np.float32)},
        sensitivity={},
        calib={"switches": Switches(method="mbq").resolved()},
    )
    with pytest.raises(FormatError, match="scales for block 2") as caught:
        quantize(model, deep, scheme=SCHEMES["w3a16"], group_size=64, out=tmp_path / "c")
    assert caught.value.code == "E4314"


def test_bad_weight_outside_the_blocks_is_named_and_nothing_appears(tmp_path: Path) -> None:
    broken = load_tiny(tmp_path / "model")
    with torch.no_grad():
        broken.module.get_parameter("model.image_newline")[3] = float("inf")
    with pytest.raises(FormatError, match=r"1 of 128 values of model\.image_newline") as caught:
        tiny_checkpoint(tmp_path / "c", broken)
    assert caught.value.code == "E4110"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_finished_blocks_are_not_done_again(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    third = tiny_checkpoint(tmp_path / "three", model)
    with State.open(tmp_path / "out.partial", {"a": 1}) as state:
        first = w3(model, tmp_path / "one", state)
        monkeypatch.setattr("mbq_export.quantize.quantize_block", None)
        second = w3(model, tmp_path / "two", state)
    assert bytes_of(first.folder) == bytes_of(second.folder)
    assert bytes_of(first.folder) == bytes_of(third.folder)


def test_damaged_block_is_done_again(model: LoadedModel, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    for turn in ("one", "two"):
        with State.open(partial, {"a": 1}) as state:
            w3(model, tmp_path / turn, state)
        path = partial / "blocks/quantize/0001.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


CHILD = """
import json, os, signal, sys
from pathlib import Path
import torch
import mbq_export.quantize as stage
from mbq_export.families import FAMILIES
from mbq_export.quantize import apply, write
from mbq_export.schemes import SCHEMES
from mbq_export.state import State
from mbq_export.writing import publish
from tests.tiny import random_scales

folder = Path(sys.argv[1])

def die(when, deadly, real):
    def act(*args, **kwargs):
        if when == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        found = real(*args, **kwargs)
        if "after " + when == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    return act

def run(name, deadly):
    done = []
    def counted(*args, **kwargs):
        done.append(1)
        return die(f"block {len(done)}", deadly, apply.quantize_block)(*args, **kwargs)
    stage.quantize_block = counted
    State.save_block = die("saved", deadly, State.save_block)
    write.write_tensors = die("shards", deadly, write.write_tensors)
    stage.publish = die("publish", deadly, publish)
    with State.open(folder / f"{name}.partial", {"seed": 0}) as state:
        stage.quantize(
            model, random_scales(model), scheme=SCHEMES["w3a16"], group_size=64,
            out=folder / name, state=state,
        )
    return len(done)

# A fork per run: importing everything once more would take longer than the runs.
torch.set_num_threads(1)
model = FAMILIES["llava_onevision"].load(folder / "model", meta_blocks=True)
for name, deadly in json.loads(sys.argv[2]):
    pid = os.fork()
    if pid == 0:
        os._exit(100 + run(name, deadly))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), (folder / name).exists(), flush=True)
"""


def test_killed_anywhere_it_resumes_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model", Tiny(layers=3))
    left = {"block 1": 3, "after block 2": 2, "after saved": 2, "after shards": 0, "publish": 0}
    runs = [("whole", "never")]
    for deadly in left:
        name = deadly.replace(" ", "-")
        runs += [(name, deadly), (name, "never")]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), json.dumps(runs)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    wanted = ["103 True"]
    for blocks in left.values():
        wanted += [f"{-signal.SIGKILL} False", f"{100 + blocks} True"]
    assert child.stdout.splitlines() == wanted, child.stderr
    for name, _ in runs:
        assert bytes_of(tmp_path / name) == bytes_of(tmp_path / "whole")


def test_disk_full_while_writing_shards_keeps_blocks_and_old_output(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tiny_checkpoint(tmp_path / "c", model, scheme="w4a16")
    before = bytes_of(old.folder)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with State.open(tmp_path / "out.partial", {"a": 1}) as state:
        first = w3(model, tmp_path / "first", state)
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            with pytest.raises(ResourceError) as caught:
                w3(model, tmp_path / "c", state)
        assert caught.value.code == "E5001"
        assert bytes_of(tmp_path / "c") == before
        w3(model, tmp_path / "c", state)
    assert bytes_of(tmp_path / "c") == bytes_of(first.folder)


def w3(model: LoadedModel, out: Path, state: State) -> QuantCheckpoint:
    return quantize(
        model,
        random_scales(model),
        scheme=SCHEMES["w3a16"],
        group_size=64,
        out=out,
        state=state,
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
