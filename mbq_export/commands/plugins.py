"""Compile, find, list and check the TensorRT plugin library."""

import enum
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbq_export.commands import options
from mbq_export.commands.console import Console
from mbq_export.errors import UsageError, located

if TYPE_CHECKING:
    from mbq_export.plugin_library import PluginLibrary


class Action(enum.StrEnum):
    """What to do."""

    BUILD = "build"
    LIST = "list"
    CHECK = "check"
    PATH = "path"


def command(
    context: typer.Context,
    action: Annotated[Action, typer.Argument(help="What to do.", metavar="build|list|check|path")],
    file: Annotated[
        Path | None,
        typer.Argument(
            help="check: a library, a folder with one, or a bundle.",
            metavar="[FILE|DIR]",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help="build, path: device, for example orin or sm89; repeatable. Default: all usual ones.",
            show_default=False,
        ),
    ] = None,
    headers: Annotated[
        Path | None,
        typer.Option("--headers", help="build: folder of NvInferRuntime.h.", show_default=False),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option("-j", "--jobs", help="build: compilers at once; 0 is one per core.", min=0),
    ] = 0,
    plugin_lib: options.PluginLibraryFile = None,
) -> None:
    """Compile, find, list and check the TensorRT plugin library.

    mbq-export plugins build --target orin

    mbq-export plugins check BUNDLE
    """
    console: Console = context.obj
    if (file is not None) != (action is Action.CHECK):
        raise UsageError(
            "E2003",
            f"plugins {action} {'needs a' if action is Action.CHECK else 'takes no'} file.",
            why="only check reads a library that is named",
            fix="mbq-export plugins check FILE",
        )
    with located("plugins"):
        if action is Action.BUILD:
            _build(console, _sms(target), headers, jobs or os.cpu_count() or 1)
        elif action is Action.LIST:
            _list(console)
        elif action is Action.PATH:
            _path(console, _sms(target), plugin_lib)
        elif file is not None:
            _check(console, file)


def _build(console: Console, sms: tuple[int, ...], headers: Path | None, jobs: int) -> None:
    from mbq_export.plugin_library.build import Recipe, build_plugin_library
    from mbq_export.plugin_library.machine_code import recorded_code, rows

    with console.progress("compiling plugins") as progress:
        library = build_plugin_library(
            Recipe(sms=sms, headers=headers, jobs=jobs), progress=progress
        )
    _show(console, library)
    code = recorded_code(library)
    console.table(
        ("GPU", "kernels", "most registers", "with spills", "bytes of machine code"), rows(code)
    )
    if code.unread:
        console.text(f"registers and spills were not read: {code.unread}")
    for gpu in code.gpus:
        for kernel, size in gpu.spills.items():
            console.warn("W6014", f"{gpu.gpu}: {kernel} spills {size} bytes per thread")
    console.finish({**_described(library), "code": code.as_json()}, what=str(library.path))


def _list(console: Console) -> None:
    from mbq_export.plugin_library import cached_libraries

    libraries = cached_libraries()
    rows = [(lib.sha256[:16], " ".join(lib.archs), lib.headers, str(lib.path)) for lib in libraries]
    if rows:
        console.table(("sha256", "GPUs", "TensorRT headers", "file"), rows)
    else:
        console.hint("mbq-export plugins build")
    console.finish(
        {"libraries": [_described(library) for library in libraries]},
        what=f"{len(libraries)} compiled from these sources",
    )


def _path(console: Console, sms: tuple[int, ...], named: Path | None) -> None:
    from mbq_export.plugin_library import find_plugin_library

    library = find_plugin_library(named=named, sms=sms)
    console.text(str(library.path))
    console.finish(_described(library), what=library.found)


def _check(console: Console, file: Path) -> None:
    from mbq_export.plugin_library.check import check_plugin_library

    offered = check_plugin_library(file)
    _show(console, offered.library)
    console.table(("plugin", "version", "namespace"), offered.creators)
    creators = [
        {"name": name, "version": version, "namespace": space}
        for name, version, space in offered.creators
    ]
    console.finish(
        {**_described(offered.library), "creators": creators},
        what=f"{len(creators)} plugins, ABI {offered.library.abi}",
    )


def _sms(targets: list[str] | None) -> tuple[int, ...]:
    from mbq_export.native import local_gpu
    from mbq_export.target import AUTO, Target

    gpu = local_gpu() if AUTO in (targets or ()) else None
    parsed = [Target.parse(each, local_sm=gpu.sm if gpu else None) for each in targets or ()]
    return tuple(sorted({each.sm for each in parsed if each.sm is not None}))


def _show(console: Console, library: "PluginLibrary") -> None:
    for name, value in _described(library).items():
        console.text(f"{name:<12} {' '.join(value) if isinstance(value, list) else value}")


def _described(library: "PluginLibrary") -> dict[str, Any]:
    return {
        "file": str(library.path),
        "sha256": library.sha256,
        "abi": library.abi,
        "archs": list(library.archs),
        "trt_headers": library.headers,
        "found": library.found,
    }
