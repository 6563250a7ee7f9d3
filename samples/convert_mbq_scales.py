"""Turn a published cache of channel scales (.pt) of MBQ or AWQ into files that `--import-scales` reads.

    python samples/convert_mbq_scales.py mbq_cache.pt scales.safetensors

A ``.pt`` file is a pickle. This script alone opens one, with torch's loader for tensors and plain containers,
which runs nothing; the package itself never does. Checked before anything is written: the size, that the file
holds ``{"scale": [(previous, (linears ...), tensor)], "clip": [(linear, tensor)]}`` and nothing else, and
that every tensor is one of numbers. Values are checked by `--import-scales`.
"""

import argparse
import json
import pickle  # its errors only: torch raises them for what it refuses to load
import sys
import zipfile
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

SCHEMA: Final = "mbq-export/published-scales@1"
LARGEST_BYTES: Final = 1 << 30
LARGEST_ENTRIES: Final = 1 << 16
LONGEST_NAME: Final = 512
LARGEST_NUMBERS: Final = 1 << 26
FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32)


class RefusedError(Exception):
    """What is wrong with a file, in one line."""


def load(path: Path) -> dict[str, Any]:
    """Read a cache without running anything in it.

    Raises:
        RefusedError: If it is too large, no cache, or holds more than tensors, text and containers.
    """
    if not path.is_file():
        raise RefusedError(f"there is no file {path}")
    if path.stat().st_size > LARGEST_BYTES:
        raise RefusedError(
            f"{path.name} has {path.stat().st_size} bytes; a cache has at most {LARGEST_BYTES}"
        )
    if not zipfile.is_zipfile(path):
        raise RefusedError(f"{path.name} is no file as torch.save writes it since 1.6")
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > LARGEST_BYTES:
        raise RefusedError(
            f"{path.name} unpacks to {unpacked} bytes; a cache has at most {LARGEST_BYTES}"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise RefusedError(f"{path.name} is no cache of tensors: {first}") from error
    if type(found) is not dict or not set(found) <= {"scale", "clip"} or "scale" not in found:
        raise RefusedError(f"{path.name} holds {_kind(found)}, not scale and perhaps clip")
    return found


def converted(cache: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a cache into tensors and the names that go with them.

    Raises:
        RefusedError: If an entry has another shape or type than described above.
    """
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    clips: list[dict[str, str]] = []
    for number, entry in enumerate(_list(cache["scale"], "scale")):
        if type(entry) not in (tuple, list) or len(entry) != 3:
            raise RefusedError(f"scale {number} is {_kind(entry)}, not (previous, linears, tensor)")
        source, into, tensor = entry
        if type(into) not in (tuple, list) or not into:
            raise RefusedError(f"the linears of scale {number} are {_kind(into)}")
        name = f"scale.{number:05}"
        tensors[name] = _tensor(tensor, name)
        if tensors[name].dim() != 1:
            raise RefusedError(f"{name} has shape {tuple(tensor.shape)}, not (K,)")
        names = [_name(linear, name) for linear in into]
        entries.append({"tensor": name, "source": _name(source, name), "into": names})
    for number, entry in enumerate(_list(cache.get("clip", []), "clip")):
        if type(entry) not in (tuple, list) or len(entry) != 2:
            raise RefusedError(f"clip {number} is {_kind(entry)}, not (linear, tensor)")
        name = f"clip.{number:05}"
        tensors[name] = _tensor(entry[1], name)
        clips.append({"tensor": name, "linear": _name(entry[0], name)})
    return tensors, {"schema": SCHEMA, "entries": entries, "clip": clips}


def _list(value: object, what: str) -> list[Any]:
    if type(value) is not list or len(value) > LARGEST_ENTRIES:
        raise RefusedError(f"{what} is {_kind(value)}, not a list of at most {LARGEST_ENTRIES}")
    return value


def _name(value: object, where: str) -> str:
    if type(value) is not str or not 0 < len(value) <= LONGEST_NAME:
        raise RefusedError(f"a name of {where} is {_kind(value)}")
    return value


def _tensor(value: object, name: str) -> Tensor:
    if type(value) is not Tensor or value.dtype not in FLOATS or value.layout != torch.strided:
        raise RefusedError(f"{name} is {_kind(value)}, not a tensor of floats")
    if value.numel() > LARGEST_NUMBERS:
        raise RefusedError(
            f"{name} has {value.numel()} numbers; at most {LARGEST_NUMBERS} are read"
        )
    # A view may be short and its storage long; only what the view shows is written.
    return value.detach().float().contiguous().clone()


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"a dict of {sorted(map(str, value))[:5]}"
    return f"a {type(value).__name__}"


def _check_place(out: Path, names: Path) -> None:
    if out.suffix != ".safetensors":
        raise RefusedError(f"{out.name} does not end in .safetensors")
    if out.exists() or names.exists():
        raise RefusedError(f"{out} or {names} exists, and nothing is overwritten")


def main(line: list[str] | None = None) -> int:
    """Convert one file; 0 if it was."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path, help="the published .pt file")
    parser.add_argument(
        "out", type=Path, help="the .safetensors to write; a .json appears beside it"
    )
    arguments = parser.parse_args(line)
    out, names = arguments.out, arguments.out.with_suffix(".json")
    try:
        _check_place(out, names)
        tensors, record = converted(load(arguments.cache))
    except RefusedError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 4
    save_file(tensors, out)
    names.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    print(f"{out}: {len(record['entries'])} scales, {len(record['clip'])} clips")
    return 0


if __name__ == "__main__":
    sys.exit(main())
