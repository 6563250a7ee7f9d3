"""A name on the command line to a model folder. Nothing here opens a network connection.

1  a folder with config.json          ./my-model
2  an alias                           tiny-llava-ov, shipped; llava-ov-7b, an id on the hub
3  a hub id                           org/name or org/name@revision
   for 2 and 3:  a  $MBQ_EXPORT_MODELS/<alias> or /<org>/<name>
                 b  a complete snapshot in the hub cache
first hit wins; what was searched is said when there is none
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from huggingface_hub.constants import HF_HUB_CACHE

from mbq_export.errors import FormatError, MachineError, UsageError
from mbq_export.families import FAMILIES
from mbq_export.families.base import Config, ModelFamily
from mbq_export.reading import contained, read_json

CONFIG: Final = "config.json"
FILES_WITH_CODE: Final = (
    CONFIG,
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
SHIPPED: Final = "tiny-llava-ov"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model lies and why there.

    Attributes:
        folder: A folder with config.json.
        name: What was asked for.
        rule: How it was found, for people: "path", "shipped", "MBQ_EXPORT_MODELS" or "hub cache".
        hub_id: Id on the hub, or nothing.
    """

    folder: Path
    name: str
    rule: str
    hub_id: str = ""


def aliases() -> dict[str, str]:
    """Short names of all families and their hub ids; the shipped model's id is empty."""
    return {
        alias: hub_id
        for family in FAMILIES.members().values()
        for alias, hub_id in family.aliases.items()
    }


def shipped_folder() -> Path:
    """Folder of the model that comes with the project: in the package, or in the checkout."""
    package = Path(__file__).parents[1]
    packaged = package / "_assets" / SHIPPED
    return packaged if packaged.is_dir() else package.parent / "samples" / "tiny_vlm" / "weights"


def locate(
    name: str,
    *,
    models: Path | None = None,
    configured: Mapping[str, str] | None = None,
    cache: Path | None = None,
) -> ModelSource:
    """Find a model folder.

    Args:
        name: A path, an alias or a hub id, perhaps with ``@revision``.
        models: Folder of local models, ``$MBQ_EXPORT_MODELS``.
        configured: Names from the user's config file to paths.
        cache: Hub cache; the usual place if None.

    Raises:
        FormatError: E4001 for a path without config.json.
        UsageError: E2001 for a name that is nothing known.
        MachineError: E3014 for a known model that is not on this machine.
    """
    path = Path(name).expanduser()
    if path.exists():
        return ModelSource(folder=_with_config(path), name=name, rule="path")
    if configured and name in configured:
        folder = _with_config(Path(configured[name]).expanduser())
        return ModelSource(folder=folder, name=name, rule="config file")
    known = aliases()
    if name == SHIPPED:
        return ModelSource(folder=_with_config(shipped_folder()), name=name, rule="shipped")
    hub_id, _, revision = known.get(name, name).partition("@")
    if name not in known and not _is_hub_id(hub_id):
        near = difflib.get_close_matches(name, known, n=1)
        raise UsageError(
            "E2001",
            f"Unknown model {name!a}.",
            why=f"it is no folder; known names: {', '.join(sorted(known))}",
            fix=(f"use {near[0]}" if near else "mbq-export models", "--model FOLDER"),
        )
    searched = [str(path)]
    for local in [models / name, models / hub_id] if models else []:
        if (local / CONFIG).is_file():
            return ModelSource(folder=local, name=name, rule="MBQ_EXPORT_MODELS", hub_id=hub_id)
        searched.append(f"$MBQ_EXPORT_MODELS/{local.relative_to(models or local)}")
    snapshot = _cached_snapshot(hub_id, revision or "main", cache or Path(HF_HUB_CACHE))
    if snapshot is not None:
        return ModelSource(folder=snapshot, name=name, rule="hub cache", hub_id=hub_id)
    at = f" --revision {revision}" if revision else ""
    raise MachineError(
        "E3014",
        f"The model {name} is not on this machine.",
        why=f"searched: {', '.join([*searched, 'the hub cache'])}; nothing is downloaded unasked",
        fix=(
            f"hf download {hub_id}{at}   (then run the same command again)",
            "--model FOLDER",
        ),
    )


def read_config(folder: Path) -> Config:
    """Read a model folder's config.json, refusing folders that want to run their own code.

    Raises:
        FormatError: E4001 without config.json, E4002 for bad JSON, E4008 for code.
    """
    _with_config(folder)
    config = read_json(contained(folder, CONFIG, code="E4105", missing="E4001"))
    for name in FILES_WITH_CODE:
        if not (folder / name).is_file():
            continue
        if "auto_map" in read_json(contained(folder, name, code="E4105"), code="E4002"):
            raise FormatError(
                "E4008",
                f"{name} of {folder.name} wants to run code from the folder (auto_map).",
                why="code that comes with a model is never run, and no option allows it",
                fix="use the checkpoint that was converted for transformers' own classes",
            )
    return config


def family_of(config: Config) -> ModelFamily:
    """Return the family that reads a config.

    Raises:
        FormatError: E4004, listing what is supported.
    """
    families = FAMILIES.members().values()
    kind = config.get("model_type")
    for family in families:
        if kind == family.model_type:
            return family
    supported = [family.model_type for family in families]
    near = difflib.get_close_matches(str(kind), supported, n=1)
    raise FormatError(
        "E4004",
        f"The model type {kind!a} is not supported{f'; nearest: {near[0]}' if near else ''}.",
        why=f"supported: {', '.join(supported)}",
        fix=("mbq-export models", "add a family: one file in mbq_export/families/"),
    )


def _with_config(folder: Path) -> Path:
    if not (folder / CONFIG).exists():
        raise FormatError(
            "E4001",
            f"There is no {CONFIG} in {folder.name}.",
            why="a model is a folder as transformers saves it",
            fix=("name the folder that holds config.json", "mbq-export models"),
        )
    return folder


def _is_hub_id(name: str) -> bool:
    """Say whether a name has the form org/name; a mistyped path like ./x or a/b/c has not."""
    parts = name.split("/")
    return len(parts) == 2 and all(
        part
        and part[0] not in ".~-"
        and part.replace("-", "").replace("_", "").replace(".", "").isalnum()
        for part in parts
    )


def _cached_snapshot(hub_id: str, revision: str, cache: Path) -> Path | None:
    """Return a complete snapshot: it has a config, and no file of it is still being downloaded."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    reference = repository / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = repository / "snapshots" / commit
    complete = (snapshot / CONFIG).is_file() and all(p.exists() for p in snapshot.iterdir())
    if complete and any((repository / "blobs").glob("*.incomplete")):
        raise FormatError(
            "E4105",
            f"The download of {hub_id} is not complete.",
            why=f"the hub cache holds unfinished files of {repository.name}",
            fix=f"hf download {hub_id}",
        )
    return snapshot if complete else None
