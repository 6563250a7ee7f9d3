"""Which models are known, and where they are on this machine."""

from typing import Annotated, Any

import typer

from mbq_export.commands import options
from mbq_export.commands.console import Console
from mbq_export.errors import MbqError


def command(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="An alias or folder: say where it is.", show_default=False)
    ] = None,
) -> None:
    """List known models and where they are on this machine."""
    from mbq_export.families import FAMILIES
    from mbq_export.families.locate import locate

    console: Console = context.obj
    if name is not None:
        source = locate(name, models=options.models_folder())
        console.text(f"{name}  {source.rule}  {source.folder}")
        console.finish(
            {"name": name, "folder": str(source.folder), "rule": source.rule},
            what=str(source.folder),
        )
        return
    models = [
        _described(alias, family.name, hub_id)
        for family in FAMILIES.members().values()
        for alias, hub_id in family.aliases.items()
    ]
    rows = [
        (m["alias"], m["family"], m["hub_id"] or "shipped with mbq-export", m["local_path"] or "-")
        for m in models
    ]
    console.table(("alias", "family", "hub id", "on this machine"), rows)
    console.finish({"models": models}, what=f"{len(models)} models")


def _described(alias: str, family: str, hub_id: str) -> dict[str, Any]:
    from mbq_export.families.locate import locate

    try:
        path: str | None = str(locate(alias, models=options.models_folder()).folder)
    except MbqError:
        path = None
    return {"alias": alias, "family": family, "hub_id": hub_id or None, "local_path": path}
