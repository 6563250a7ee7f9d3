"""The result of a run: what it holds, how it is checked, how it is written."""

import json
from pathlib import Path
from typing import Any, Final

from mbq_export.errors import FormatError

SCHEMA: Final = "mbq-export/kernels@1"
FILE: Final = "kernels.json"
PAGE: Final = "kernels.md"
TOP_KEYS: Final = frozenset(
    {"schema", "dry_run", "complete", "suite", "device", "software", "sensors", "protocol"}
    | {"ceilings", "absent", "rows", "chain", "decode", "rehearsal", "targets", "predictions"}
)
ROW_KEYS: Final = frozenset(
    {"entrant", "source", "scheme", "dtype", "group_size", "n", "k", "m", "config", "weight_bytes"}
    | {"copies", "correct", "timing", "gb_s", "read_gb_s", "limit_us", "percent_of_read"}
    | {"percent_of_datasheet", "speedup", "predicted_us"}
)
OUT_OF_MEMORY: Final = "OutOfMemoryError"
"""How a reason begins that says nothing about a kernel."""
TIMES: Final = ("timing", "gb_s", "read_gb_s", "limit_us", "percent_of_read", "speedup")


def check_document(document: Any) -> dict[str, Any]:
    """Check a result against its schema.

    Raises:
        FormatError: E4102 with the first thing that is wrong.
    """
    wrong = _wrong(document)
    if wrong:
        raise FormatError(
            "E4102",
            f"This is no result of the kernel benchmark: {wrong}.",
            why=f"its schema is {SCHEMA}",
            fix="mbq-export bench --kernels -o DIR",
        )
    checked: dict[str, Any] = document
    return checked


def _wrong(document: Any) -> str:
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        return "another schema"
    if set(document) != TOP_KEYS:
        return f"keys {', '.join(sorted(set(document) ^ TOP_KEYS))} are missing or too many"
    for row in (*document["rows"], *document["rehearsal"]["rows"]):
        missing = ROW_KEYS - row.keys()
        if missing:
            return f"a row lacks {', '.join(sorted(missing))}"
        if (row["timing"] is None) != ("timing_why" in row):
            return "a row has neither a time nor a reason, or both"
        if document["dry_run"] and any(row[key] is not None for key in TIMES):
            return "a dry run holds a time"
    return ""


def json_text(document: dict[str, Any]) -> str:
    """The result as text: sorted keys, two spaces; NaN is refused."""
    return json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"


def write_result(folder: Path, document: dict[str, Any], page: str) -> None:
    """Write the result and its page, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in ((FILE, json_text(document)), (PAGE, page)):
        staged = folder / f"{name}.partial"
        staged.write_text(text)
        staged.replace(folder / name)


def failures(document: dict[str, Any]) -> list[str]:
    """Everything of ours that was run and has no right answer, with its reason.

    A wrong answer, a refusal and a crash are all failures; want of memory is a property of the card. Peers may fail.
    """
    ran = document["rehearsal"] if document["dry_run"] else document
    found = [
        (f"{row['entrant']} at {row['n']}x{row['k']}, M = {row['m']}", row) for row in ran["rows"]
    ]
    found += [(f"{row['entrant']} in the chain", row) for row in ran["chain"]]
    if ran["decode"]:
        found += [
            (f"{row['entrant']} decoding at context {row['context']}", row)
            for row in ran["decode"]["rows"]
        ]
    return [
        f"{what}: {row['timing_why']}"
        for what, row in found
        if row["correct"] is not True
        and row.get("source") != "peer"
        and OUT_OF_MEMORY not in row["timing_why"]
    ]
