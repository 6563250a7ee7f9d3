"""Keep the figures of the model card equal to the records: python -m samples.tiny_vlm.card.

evaluation.json    the shipped weights, on three draws, and `generate` on part of the first
training.json      the record that train.py wrote of a run from nothing

With --record RUN/training.json the record of a new run is taken over first.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Final

from mbq_export.writing import json_bytes, write_file

FOLDER: Final = Path(__file__).parent
KINDS: Final = ("count", "color", "exist", "count_attr", "read", "at", "rel", "where", "caption")


def shipped_figures(record: dict[str, Any]) -> str:
    """Return the tables of evaluation.json, in Markdown."""
    draws = record["packed"]
    blind = [percent(record["blind"]), *[""] * (len(draws) - 1)]
    head = ["", *(f"draw {draw['seed']}" for draw in draws)]
    rows = [head, *accuracy_rows(draws), ["answering blind", *blind]]
    generate = record["generate"]
    return (
        f"{table(rows)}\nWith `model.generate`, one call per question: {interval(generate)} on the first "
        f"{generate['questions']:,} questions of draw 0; packed, on the same questions: "
        f"{percent(generate['packed_exact_match'])}.\n"
    )


def run_figures(record: dict[str, Any]) -> str:
    """Return the tables of training.json, in Markdown."""
    rows = [["", "draw 0"], *accuracy_rows([record["evaluation"]])]
    return f"{table(stage_rows(record))}\n{table(rows)}"


def accuracy_rows(parts: list[dict[str, Any]]) -> list[list[str]]:
    """Return questions, exact match and each kind's share, one column per evaluation."""
    return [
        ["questions", *(f"{part['questions']:,}" for part in parts)],
        ["**exact match**", *map(interval, parts)],
        *([kind, *(percent(part["by_kind"][kind][0]) for part in parts)] for kind in KINDS),
    ]


def stage_rows(run: dict[str, Any]) -> list[list[str]]:
    """Return what each stage of the run took and reached."""
    rows = [
        ["stage", "steps x batch", "wall s", "processor s", "last loss", "monitored at the end"]
    ]
    for stage in run["stages"]:
        last = stage["log"][-1]
        watched = ("exact_match", "color", "kind", "unseen_digit")
        seen = ", ".join(f"{name} {percent(last[name])}" for name in watched if name in last)
        steps = f"{last['step']:,} x {stage['batch']}"
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


FIGURES: Final = {"evaluation.json": shipped_figures, "training.json": run_figures}


def current_card() -> str:
    """Return the README as it should be, from the records beside it."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name, figures in FIGURES.items():
        if (FOLDER / name).exists():
            begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
            before, rest = text.split(begin)
            record = json.loads((FOLDER / name).read_text(encoding="utf-8"))
            text = before + begin + figures(record) + end + rest.split(end)[1]
    return text


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
