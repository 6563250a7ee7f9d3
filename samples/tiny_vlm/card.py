"""Keep the figures of the model card equal to the records: python -m samples.tiny_vlm.card.

evaluation.json    the shipped weights: packed on three draws, and `generate` on part of the first
training.json      the record that train.py wrote of one run from nothing

With --record RUN/training.json the record of a new run is taken over first.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Final

from mbq_export.writing import json_bytes, write_file

FOLDER: Final = Path(__file__).parent
BEGIN: Final = "<!-- figures: begin -->\n"
END: Final = "<!-- figures: end -->\n"
KINDS: Final = ("count", "color", "exist", "count_attr", "read", "at", "rel", "where", "caption")


def figures(shipped: dict[str, Any], run: dict[str, Any]) -> str:
    """Return the generated part of the card, in Markdown."""
    draws = shipped["packed"]
    rows = [
        ["", *(f"shipped, draw {draw['seed']}" for draw in draws), "run from nothing, draw 0"],
        ["questions", *(f"{part['questions']:,}" for part in (*draws, run["evaluation"]))],
        ["**exact match**", *(interval(part) for part in (*draws, run["evaluation"]))],
        ["answering blind", percent(shipped["blind"]), *[""] * len(draws)],
    ]
    rows += [
        [kind, *(percent(part["by_kind"][kind][0]) for part in (*draws, run["evaluation"]))]
        for kind in KINDS
    ]
    generate = shipped["generate"]
    asked = (
        f"With `model.generate`, one call per question: {interval(generate)} on the first "
        f"{generate['questions']:,} questions of draw 0; packed, on the same questions: "
        f"{percent(generate['packed_exact_match'])}."
    )
    return f"{table(rows)}\n{asked}\n\n{table(stage_rows(run))}"


def stage_rows(run: dict[str, Any]) -> list[list[str]]:
    """Return what each stage of the run took and reached."""
    rows = [
        ["stage", "steps x batch", "wall s", "processor s", "last loss", "monitored at the end"]
    ]
    for stage in run["stages"]:
        last = stage["log"][-1]
        watched = ("exact_match", "color", "kind", "unseen_digit")
        seen = ", ".join(f"{name} {percent(last[name])}" for name in watched if name in last)
        steps = f"{stage['steps']:,} x {stage['batch']}"
        seconds = [f"{stage[key]:,.0f}" for key in ("wall_s", "cpu_s")]
        rows.append([stage["name"], steps, *seconds, f"{last['loss']:.4f}", seen])
    return rows


def table(rows: list[list[str]]) -> str:
    """Return a Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |\n" for row in rows]
    return "".join([lines[0], "|---" * len(rows[0]) + "|\n", *lines[1:]])


def percent(share: float) -> str:
    """Return a share as a percentage with two digits."""
    return f"{100 * share:.2f} %"


def interval(part: dict[str, Any]) -> str:
    """Return accuracy with its 95 % interval."""
    low, high = 100 * part["low"], 100 * part["high"]
    return f"**{percent(part['exact_match'])}** [{low:.2f}, {high:.2f}]"


def card_with(text: str, part: str) -> str:
    """Return the card with its generated part replaced."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{part}{END}{after}"


def current_card() -> str:
    """Return the README as it should be, from the records beside it."""
    shipped, run = (
        json.loads((FOLDER / name).read_text(encoding="utf-8"))
        for name in ("evaluation.json", "training.json")
    )
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    return card_with(text, figures(shipped, run))


def main() -> None:
    """Take over a record if asked to, then rewrite the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, help="training.json of a finished run")
    chosen = parser.parse_args()
    if chosen.record:
        record = json.loads(chosen.record.read_text(encoding="utf-8"))
        write_file(FOLDER / "training.json", json_bytes(record))
    write_file(FOLDER / "README.md", current_card().encode())


if __name__ == "__main__":
    main()
