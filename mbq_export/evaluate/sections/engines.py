"""Compiled engines: what they hold, what was checked in their layer tables, and whether they ever ran."""

from collections import Counter
from typing import Any, Final

from mbq_export.evaluate.document import BAD, GOOD, UNSURE, Block, Cell, Missing, Section, table
from mbq_export.evaluate.gathering import BuiltEngines, Found
from mbq_export.evaluate.lookup import dig, entries, items, words
from mbq_export.evaluate.wording import figure, size

INT4: Final = "Int4"
MEANINGS: Final = {
    "engine.A2": "quantized linears without Int4 or Int8 constants",
    "engine.A3": "weights dequantized to memory",
    "engine.A4": "linears of 8-bit activations without a product of integers",
    "engine.A5": "float constants as large as weights",
    "engine.A6.attention": "fused attention kernels",
    "engine.A6.cache": "cache tensors updated in place",
    "engine.A7": "constants' bytes off the exporter's count, share",
    "engine.A8": "inputs, outputs and profiles unlike the graph's",
}
"""What the checks of a layer table count."""


def section(found: Found) -> Section:
    """Show the engines of every bundle."""
    rows, checks = [], []
    for subject in found.subjects:
        for built in subject.engines:
            rows += _rows(subject.name, built)
            checks += _checks(subject.name, built)
    blocks: list[Block] = []
    if rows:
        header = ("engine", "verified", "built by", "devices", "size", "layers", "Int4 constants")
        blocks.append(table((*header, "why not verified"), rows, caption="Engines"))
    else:
        why = "no bundle holds one: mbq-export build --target rtx4090:rtx"
        blocks.append(Missing(what="Engines", why=why))
    if checks:
        columns = ("check", "verdict", "engine", "value", "limit", "why")
        blocks.append(table(columns, checks, caption="Checks of the layer tables"))
    return Section(key="engines", title="Engines", blocks=tuple(blocks))


def _rows(name: str, built: BuiltEngines) -> list[tuple[str | Cell, ...]]:
    record = built.record
    verified = record.get("verified") is True
    reason = words(record.get("why")) or "no reason was recorded"
    return [
        (
            f"{name} {built.folder}/{engine}",
            Cell(text="yes", tone=GOOD) if verified else Cell(text="no", tone=UNSURE),
            " ".join(words(record.get(key)) for key in ("flavour", "version")),
            words(record.get("sm")),
            size(dig(facts, "bytes")),
            words(dig(facts, "layers")),
            str(constants(built.layers, engine)[INT4]),
            "" if verified else reason,
        )
        for engine, facts in entries(record.get("engines")).items()
    ]


def constants(layers: Any, engine: str) -> Counter[str]:
    """Count the constants of an engine by type, each once though several layers read it."""
    found: dict[str, str] = {}
    for row in items(dig(layers, "engines", engine, "layers")):
        held = row.get("const")
        for constant in held if isinstance(held, list) else []:
            name, kind = dig(constant, 0), dig(constant, 1)
            if isinstance(name, str) and isinstance(kind, str):
                found[name] = kind
    return Counter(found.values())


def _checks(name: str, built: BuiltEngines) -> list[tuple[str | Cell, ...]]:
    rows: list[tuple[str | Cell, ...]] = []
    for engine, facts in entries(built.record.get("engines")).items():
        for check in items(dig(facts, "checks")):
            passed = check.get("pass") is True
            verdict = Cell(text="pass", tone=GOOD) if passed else Cell(text="FAIL", tone=BAD)
            if check.get("run") is False:
                verdict = Cell(text="not run", tone=UNSURE)
            checked = words(check.get("name"))
            rows.append(
                (
                    MEANINGS.get(checked, checked),
                    verdict,
                    f"{name} {built.folder}/{engine}",
                    *(figure(check.get(key)) for key in ("value", "threshold")),
                    words(check.get("why")),
                )
            )
    return rows
