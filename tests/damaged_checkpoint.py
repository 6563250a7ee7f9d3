"""Ways to damage a written checkpoint, each with the code and the words that its reader answers."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbq_export.tensor_file import TensorFile, write_tensors

QUERY = "model.language_model.layers.0.self_attn.q_proj"
OUT = "model.language_model.layers.1.self_attn.o_proj"
SHARD = "model-00001-of-00001.safetensors"


def edit(**changes: Any) -> Callable[[Path], object]:
    """Change top-level keys of mbq.json; a function gets the old value."""

    def act(folder: Path) -> None:
        info = json.loads((folder / "mbq.json").read_text())
        for key, value in changes.items():
            info[key] = value(info[key]) if callable(value) else value
        (folder / "mbq.json").write_text(json.dumps(info))

    return act


def edit_linear(**changes: Any) -> Callable[[Path], object]:
    return edit(linears=lambda rows: [rows[0] | changes, *rows[1:]])


def edit_file(**changes: Any) -> Callable[[Path], object]:
    return edit(files=lambda rows: [*rows[:-1], rows[-1] | changes])


def edit_tensor(
    name: str, change: Callable[[NDArray[Any]], Any] | None
) -> Callable[[Path], object]:
    """Change or remove a tensor, and make hash and size fit, so that later checks are reached."""

    def act(folder: Path) -> None:
        file = TensorFile(folder / SHARD)
        tensors = {key: np.array(file.array(key)) for key in file.entries}
        old = tensors.pop(name)
        if change is not None:
            tensors[name] = np.asarray(change(old))
        write_tensors(folder / SHARD, tensors)
        rehash(folder)

    return act


def rehash(folder: Path) -> None:
    info = json.loads((folder / "mbq.json").read_text())
    for row in info["files"]:
        data = (folder / row["path"]).read_bytes()
        row |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "mbq.json").write_text(json.dumps(info))


def put(array: NDArray[Any], value: float) -> NDArray[Any]:
    array.flat[0] = value
    return array


def second_shard(folder: Path) -> None:
    """The same tensor once more, in a listed file."""
    write_tensors(folder / "model-00002.safetensors", {f"{QUERY}.scales": np.ones(1, np.float16)})
    row = {"path": "model-00002.safetensors", "bytes": 0, "sha256": ""}
    edit(files=lambda rows: [*rows, row])(folder)
    rehash(folder)


def linked(folder: Path) -> None:
    shutil.copyfile(folder / "config.json", folder.parent / "outside.json")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../outside.json")


def sparse(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


BAD = {
    "no mbq.json": ("E4001", "There is no mbq.json", lambda f: (f / "mbq.json").unlink()),
    "not JSON": ("E4604", "not a strict JSON object", lambda f: (f / "mbq.json").write_text("{")),
    "huge": ("E4604", "has 67108865 bytes", lambda f: sparse(f / "mbq.json", (64 << 20) + 1)),
    "another schema": ("E4604", "schema is 'mbq-export/bundle@1'", edit(schema="mbq-export/bundle@1")),
    "no version": ("E4604", "its schema is 'mbq-export/checkpoint'", edit(schema="mbq-export/checkpoint")),
    "linears no list": ("E4604", "linears is not of type list", edit(linears={})),
    "linear no object": ("E4604", "an entry of linears is not an object", edit(linears=[1])),
    "n is text": ("E4604", "n in linears is not of type int", edit_linear(n="128")),
    "n is a flag": ("E4604", "n in linears is not of type int", edit_linear(n=True)),
    "no files": ("E4604", "files is not of type list", edit(files=None)),
    "tied to a number": ("E4604", "tied does not map", edit(tied={"lm_head.weight": 1})),
    "no scheme": ("E4604", "scheme is not of type dict", edit(scheme="w3a16")),
    "unknown scheme": ("E4604", "unknown scheme 'w5a16'", edit_linear(scheme="w5a16")),
    "listed twice": ("E4604", "is listed twice", edit(linears=lambda rows: [rows[0], *rows])),
    "group of 48": ("E4604", "128 x 128 weights of w3a16 in groups of 48", edit_linear(group_size=48)),
    "group of 0": ("E4604", "in groups of 0", edit_linear(group_size=0)),
    "negative n": ("E4604", "-1 x 128 weights", edit_linear(n=-1)),
    "unknown layout": ("E4604", "its layout is 'w3t'", edit(layout={"name": "w3t", "version": 1})),
    "path upwards": ("E4605", "leads upwards", edit_file(path="../w3/config.json")),
    "absolute path": ("E4605", "is absolute", edit_file(path="/etc/passwd")),
    "link outside": ("E4605", "is a link that leaves the folder", linked),
    "file missing": ("E4601", "There is no file", lambda f: (f / "tokenizer.json").unlink()),
    "file shorter": ("E4602", "bytes instead of", lambda f: cut(f / SHARD)),
    "file flipped": ("E4602", "other content", lambda f: flip(f / SHARD)),
    "config unlisted": (
        "E4604", "config.json is not among", edit(files=lambda rows: [r for r in rows if r["path"] != "config.json"])
    ),
    "tensor missing": ("E4103", f"There is no tensor '{QUERY}.zeros'", edit_tensor(f"{QUERY}.zeros", None)),
    "tensor in two files": ("E4105", "is in model-00001", second_shard),
    "wrong n": ("E4102", r"is I32 \(128, 12\)", edit_linear(n=64)),
    "wrong bits": ("E4102", r"is I32 \(128, 12\)", edit_linear(scheme="w4a16")),
    "wrong group": ("E4102", r"is F16 \(128, 2\)", edit_linear(group_size=128)),
    "words transposed": ("E4102", r"is I32 \(12, 128\)", edit_tensor(f"{QUERY}.qweight", np.transpose)),
    "scales in fp32": ("E4102", "is F32", edit_tensor(f"{QUERY}.scales", lambda a: a.astype(np.float32))),
    "zeros in I32": ("E4102", "is I32", edit_tensor(f"{QUERY}.zeros", lambda a: a.astype(np.int32))),
    "bias in I32": ("E4102", "expected F16 or BF16 or F32", edit_tensor(f"{QUERY}.bias", lambda a: a.astype(np.int32))),
    "zero of 8": ("E4411", "reach 8", edit_tensor(f"{QUERY}.zeros", lambda a: put(a, 8))),
    "scale of 0": ("E4411", "1 scales are not finite and positive", edit_tensor(f"{QUERY}.scales", lambda a: put(a, 0))),
    "scale NaN": ("E4411", "scales are not finite", edit_tensor(f"{QUERY}.scales", lambda a: put(a, np.nan))),
    "scale infinite": ("E4411", "scales are not finite", edit_tensor(f"{QUERY}.scales", lambda a: put(a, np.inf))),
}  # fmt: skip

ACTIVATION = {"bits": 8, "granularity": "token", "symmetric": True, "dynamic": True}


def edit_scheme(**changes: Any) -> Callable[[Path], object]:
    return edit(scheme=lambda scheme: scheme | changes)


BAD_CHANNELS = {
    "scales in fp16": ("E4102", "is F16", edit_tensor(f"{QUERY}.scales", lambda a: a.astype(np.float16))),
    "scales in a row": ("E4102", r"is F32 \(128,\)", edit_tensor(f"{QUERY}.scales", lambda a: a[:, 0])),
    "two scales per row": ("E4102", r"is F32 \(128, 2\)", edit_tensor(f"{QUERY}.scales", lambda a: np.repeat(a, 2, 1))),
    "no scales": ("E4103", f"There is no tensor '{QUERY}.scales'", edit_tensor(f"{QUERY}.scales", None)),
    "scale of 0": ("E4411", "1 scales are not finite and positive", edit_tensor(f"{QUERY}.scales", lambda a: put(a, 0))),
    "scale negative": ("E4411", "1 scales are not finite", edit_tensor(f"{QUERY}.scales", lambda a: put(a, -1))),
    "scale infinite": ("E4411", "scales are not finite", edit_tensor(f"{QUERY}.scales", lambda a: put(a, np.inf))),
    "words of 3 bits": ("E4102", r"is I32 \(128, 12\)", edit_tensor(f"{QUERY}.qweight", lambda a: a[:, :12])),
    "groups of 128": ("E4102", r"is F32 \(128, 1\)", edit_linear(group_size=128)),
    "groups of 64": ("E4604", "weights of w4a8 in groups of 64", edit_linear(group_size=64)),
    "rows that end inside a word": ("E4604", "128 x 124 weights of w4a8", edit_linear(k=124)),
    "rows too wide for exact sums": ("E4604", "128 x 132112 weights of w4a8", edit_linear(k=132_112)),
    "of another scheme": ("E4604", "weights of w4a16 in groups of 0", edit_linear(scheme="w4a16")),
    "activations in full": ("E4604", "activation is None", edit_scheme(activation=None)),
    "activation missing": ("E4604", "activation is None", edit(scheme={"name": "w4a8", "group_size": 0})),
    "activations of 4 bits": ("E4604", "'bits': 4", edit_scheme(activation=ACTIVATION | {"bits": 4})),
    "static activations": ("E4604", "'dynamic': False", edit_scheme(activation=ACTIVATION | {"dynamic": False})),
    "activations per channel": ("E4604", "'granularity': 'channel'", edit_scheme(activation=ACTIVATION | {"granularity": "channel"})),
}  # fmt: skip
