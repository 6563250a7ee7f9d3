"""Where everything came from: one column per bundle, one table per machine that measured."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from mbq_export.bundle import PROVENANCE
from mbq_export.evaluate.document import (
    UNSURE,
    Block,
    Cell,
    Missing,
    Note,
    Section,
    table,
)
from mbq_export.evaluate.gathering import BENCH, Found, Subject
from mbq_export.evaluate.lookup import dig, entries, number, words
from mbq_export.evaluate.sections.verdict import scheme_of
from mbq_export.evaluate.wording import figure, short_hash, size

Fact = Callable[[Subject], str]


def section(found: Found) -> Section:
    """Say which model, data, options, versions and machine."""
    blocks: list[Block] = []
    if found.subjects:
        blocks.append(_table(found))
        if _models_differ(found):
            blocks.append(
                Note(
                    text="These bundles hold different models: no differences between them are computed.",
                    tone=UNSURE,
                )
            )
    else:
        blocks.append(Missing(what="Provenance", why="no bundle was given"))
    blocks += [
        table(
            ("machine", ""),
            _machine(result.report.details.get("env")),
            caption=f"Measured by {result.name}",
        )
        for result in found.of_kind(BENCH)
        if result.report.details.get("env")
    ]
    return Section(key="provenance", title="Provenance", blocks=tuple(blocks))


FACTS: dict[str, Fact] = {
    "model": lambda s: words(dig(s.manifest, "source", "model")),
    "family": lambda s: words(dig(s.manifest, "source", "family")),
    "revision": lambda s: words(dig(s.manifest, "source", "revision")),
    "licence": lambda s: words(dig(s.manifest, "source", "license")),
    "model configuration": lambda s: short_hash(dig(s.manifest, "source", "config")),
    "model weights": lambda s: ", ".join(
        map(short_hash, entries(dig(s.manifest, "source", "shards")).values())
    ),
    "number format": scheme_of,
    "calibration data": lambda s: short_hash(dig(s.manifest, "calibration", "sha256")),
    "calibration samples": lambda s: words(dig(s.manifest, "calibration", "samples")),
    "seed": lambda s: words(dig(s.manifest, "seed")),
    "longest context": lambda s: words(dig(s.manifest, "limits", "max_context")),
    "mbq-export": lambda s: words(dig(s.manifest, "tool", "version")),
    "packages": lambda s: words(dig(s.manifest, "tool", "packages")),
    "command": lambda s: words(s.part(PROVENANCE, "command")),
    "machine": lambda s: words(s.part(PROVENANCE, "machine")),
    "finished": lambda s: _moment(s.part(PROVENANCE, "finished_unix")),
    "seconds by stage": lambda s: words(s.part(PROVENANCE, "seconds")),
    "bundle": lambda s: short_hash(s.bundle.sha256),
}


def _table(found: Found) -> Block:
    rows: list[tuple[str | Cell, ...]] = []
    for name, fact in FACTS.items():
        values = [fact(subject) for subject in found.subjects]
        if any(values):
            shown = [value or "not recorded" for value in values]
            rows.append((name, *_marked(name, shown, differ=_models_differ(found))))
    header = ("", *(subject.name for subject in found.subjects))
    return table(header, rows, caption="Bundles")


def _marked(name: str, values: list[str], *, differ: bool) -> list[str | Cell]:
    """Mark the models of bundles that hold another one than the first."""
    if name != "model" or not differ:
        return list(values)
    return [values[0], *(Cell(text=f"{value} (other model)", tone=UNSURE) for value in values[1:])]


def _models_differ(found: Found) -> bool:
    return any(subject.model != found.subjects[0].model for subject in found.subjects)


def _machine(env: Any) -> list[tuple[str, str]]:
    rows = {
        "CPU": f"{words(dig(env, 'cpu'))}, {words(dig(env, 'cpus'))} CPUs",
        "frequency": f"{figure(dig(env, 'cpu_mhz'))} MHz" if dig(env, "cpu_mhz") else "",
        "last cache": size(dig(env, "last_cache_bytes")),
        "memory": size(dig(env, "ram_bytes")),
        "GPU": words(dig(env, "gpu")) or f"none: {words(dig(env, 'gpu_why'))}",
        "system": f"{words(dig(env, 'os'))}, {words(dig(env, 'machine'))}",
        "packages": words(dig(env, "packages")),
    }
    return [(name, value) for name, value in rows.items() if value]


def _moment(seconds: Any) -> str:
    moment = number(seconds)
    if moment is None or not 0 <= moment < 1 << 34:
        return ""
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M} UTC"
