"""The converter opens pickles so that the package need not: strict about what is inside, runs nothing."""

import importlib.util
import io
import json
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

SCRIPT = Path(__file__).parents[2] / "samples" / "convert_mbq_scales.py"
NORM = "model.layers.0.input_layernorm"
LINEARS = tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")


SPEC = importlib.util.spec_from_file_location("convert_mbq_scales", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
MODULE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(MODULE)


@dataclass(frozen=True, kw_only=True)
class Done:
    returncode: int
    stderr: str


def convert(cache: Path, out: Path) -> Done:
    err = io.StringIO()
    with redirect_stderr(err), redirect_stdout(io.StringIO()):
        status = MODULE.main([str(cache), str(out)])
    return Done(returncode=status, stderr=err.getvalue())


def saved(folder: Path, value: object) -> Path:
    torch.save(value, folder / "cache.pt")
    return folder / "cache.pt"


def test_cache_becomes_tensors_and_names(tmp_path: Path) -> None:
    scale, clip = torch.rand(8, dtype=torch.bfloat16) + 0.5, torch.rand(4, 1, 1)
    value = {"scale": [(NORM, LINEARS, scale)], "clip": [(LINEARS[0], clip)]}
    done = convert(saved(tmp_path, value), tmp_path / "scales.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    tensors = load_file(tmp_path / "scales.safetensors")
    assert np.array_equal(tensors["scale.00000"], scale.float().numpy())
    assert np.array_equal(tensors["clip.00000"], clip.numpy())
    assert json.loads((tmp_path / "scales.json").read_text()) == {
        "schema": "mbq-export/published-scales@1",
        "entries": [{"tensor": "scale.00000", "source": NORM, "into": list(LINEARS)}],
        "clip": [{"tensor": "clip.00000", "linear": LINEARS[0]}],
    }


class Runs:
    """Would create a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_program_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    cache = saved(tmp_path, {"scale": [], "more": Runs(tmp_path / "canary")})
    done = convert(cache, tmp_path / "scales.safetensors")
    assert done.returncode == 4
    assert done.stderr.startswith("refused: cache.pt is no cache of tensors")
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "scales.safetensors").exists()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "holds a list"),
        ({"clip": []}, "holds a dict of ['clip']"),
        ({"scale": [], "other": []}, "holds a dict of ['other', 'scale']"),
        ({"scale": {}}, "scale is a dict"),
        ({"scale": [(NORM, LINEARS)]}, "scale 0 is a tuple"),
        ({"scale": [(NORM, LINEARS[0], torch.ones(8))]}, "the linears of scale 0 are a str"),
        ({"scale": [(NORM, (), torch.ones(8))]}, "the linears of scale 0 are a tuple"),
        ({"scale": [(7, LINEARS, torch.ones(8))]}, "a name of scale.00000 is a int"),
        ({"scale": [("", LINEARS, torch.ones(8))]}, "a name of scale.00000"),
        ({"scale": [(NORM, LINEARS, [1.0])]}, "scale.00000 is a list"),
        ({"scale": [(NORM, LINEARS, torch.ones(8, dtype=torch.int32))]}, "torch.int32"),
        ({"scale": [(NORM, LINEARS, torch.ones(2, 8))]}, "shape (2, 8)"),
        ({"scale": [(NORM, LINEARS, torch.ones(1).expand(1 << 40))]}, "at most"),
        ({"scale": [], "clip": [(LINEARS[0],)]}, "clip 0 is a tuple"),
    ],
)
def test_anything_else_is_refused_in_one_line(tmp_path: Path, value: object, said: str) -> None:
    done = convert(saved(tmp_path, value), tmp_path / "scales.safetensors")
    assert done.returncode == 4
    assert done.stderr.startswith("refused: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.pt"]


def test_file_that_unpacks_to_more_than_it_is_worth_is_refused(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(tmp_path / "cache.pt", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("archive/data/0", "w", force_zip64=True) as member,
    ):
        for _ in range(1025):
            member.write(bytes(1 << 20))
    done = convert(tmp_path / "cache.pt", tmp_path / "scales.safetensors")
    assert done.returncode == 4
    assert "unpacks to" in done.stderr


@pytest.mark.parametrize("content", [b"", b"\x80\x02}.", b"text"])
def test_file_that_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cache.pt").write_bytes(content)
    done = convert(tmp_path / "cache.pt", tmp_path / "scales.safetensors")
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)


@pytest.mark.parametrize("name", ["scales.pt", "taken.safetensors"])
def test_place_that_is_taken_or_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "taken.json").write_text("mine")
    done = convert(saved(tmp_path, {"scale": []}), tmp_path / name)
    assert done.returncode == 4
    assert (tmp_path / "taken.json").read_text() == "mine"
