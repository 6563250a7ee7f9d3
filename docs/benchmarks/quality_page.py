"""The Markdown page of quality.json: tables, targets, and sentences that the protocol allows."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from docs.benchmarks.quality_words import HEAD, findings, reached
from mbq_export.evaluate.quality import ANSWER, PROMPT, VISION

Document = Mapping[str, Any]
VARIANTS: Final = {
    "plain": "Sample model",
    "stress": "Stress variant (synthetic outliers)",
}
FULL: Final = "fp"


def page(document: Document) -> str:
    """Return the page.

    Args:
        document: Contents of quality.json.
    """
    setup = document["setup"]
    parts = [introduction(document)]
    if setup["remark"]:
        parts.append(f"**Remark.** {setup['remark']}\n")
    if not setup["current_code"]:
        parts.append(
            "**Some rows were computed by other sources than the last ones**; see quality.json.\n"
        )
    parts += ["## Targets\n", reached(document["targets"])]
    for variant, title in VARIANTS.items():
        parts += [f"## {title}\n", *of_variant(document, variant)]
    parts += [
        "## What helps and what does not\n",
        "\n".join(findings(document["pairs"], titles(document))) + "\n",
        missing(document),
        versions(setup, document["rows"]),
    ]
    return "\n".join(part for part in parts if part)


def introduction(document: Document) -> str:
    """Say what was measured, and how."""
    setup, rows = document["setup"], document["rows"]
    models = setup["models"]
    return HEAD.format(
        questions=f"{rows[0]['questions']:,}" if rows else "no",
        images=setup["evaluation"]["images"],
        evaluation_seed=setup["evaluation"]["seed"],
        blind=percent(setup["blind_accuracy"]),
        device=setup["device"],
        samples=setup["calibration"]["samples"],
        data=setup["calibration"]["data"],
        draws=setup["calibration"]["draws"],
        count=len(models),
        names=", ".join(
            f"{name} (`{one['sha256'][:12]}`{', shipped' if one['shipped'] else ''})"
            for name, one in models.items()
        ),
    )


def of_variant(document: Document, variant: str) -> Iterator[str]:
    """Yield all tables of a variant."""
    names = titles(document)
    models = [*document["setup"]["models"]]
    rows = [row for row in document["rows"] if row["variant"] == variant]
    first = [row for row in rows if row["model"] == models[0] and not row["draw"]]
    pairs = [pair for pair in document["pairs"] if pair["variant"] == variant]
    shown = [pair for pair in pairs if pair["model"] == models[0] and not pair["draw"]]
    if not first:
        yield "Not measured.\n"
        return
    yield table(ACCURACY_HEAD, accuracy_rows(first, shown, names))
    seeds = [one for one in document["seeds"] if one["variant"] == variant]
    if len(models) > 1:
        yield "### Every training seed: exact match, % (KL at answers)\n"
        yield table(*training_seeds(seeds, models, names))
    yield "### Exact match by kind of question, %\n"
    yield table(*kinds(first, names))
    yield "### Methods against each other, on the same questions\n"
    yield table(PAIR_HEAD, pair_rows(shown, names))
    yield "### Every calibration draw: exact match, % (KL at answers)\n"
    yield table(*draws([row for row in rows if row["model"] == models[0]], names))


ACCURACY_HEAD: Final = (
    "format",
    "method",
    "exact match, %",
    "minus full precision, points",
    "minus rtn, points",
    "KL answers [95 %]",
    "KL prompt",
    "KL vision",
    "p99 answers",
    "same top token, answers, %",
)
PAIR_HEAD: Final = (
    "format",
    "second - first",
    "exact match, points [95 %]",
    "only first / only second right",
    "McNemar p",
    "KL answers [95 %]",
)


def titles(document: Document) -> dict[str, str]:
    """Formats as people read them."""
    found = {name: one["title"] for name, one in document["setup"]["formats"].items()}
    return {FULL: "-", **found}


def accuracy_rows(
    rows: Sequence[Document], pairs: Sequence[Document], names: Mapping[str, str]
) -> Iterator[list[str]]:
    """One line per model."""
    found = {(p["format"], p["method"], p["against"]): p["accuracy"] for p in pairs}
    for row in rows:
        full = row["method"] == FULL
        kl = row["kl"]
        differences = [found.get((row["format"], row["method"], one)) for one in (FULL, "rtn")]
        yield [
            names[row["format"]],
            "full precision" if full else row["method"],
            interval(row["accuracy"], points),
            *("" if one is None else interval(one, signed_points) for one in differences),
            "" if full else interval(kl[ANSWER]["mean"], nats),
            *("" if full else nats(kl[m]["mean"]["value"]) for m in (PROMPT, VISION)),
            "" if full else nats(kl[ANSWER]["p99"]),
            "" if full else percent(kl[ANSWER]["same_top_token"], digits=2, unit=""),
        ]


def training_seeds(
    seeds: Sequence[Document], models: Sequence[str], names: Mapping[str, str]
) -> tuple[list[str], list[list[str]]]:
    """Every training seed and the geometric mean of KL."""
    head = ["format", "method", *models, "KL, geometric mean"]
    body = [
        [
            names[one["format"]],
            one["method"],
            *(both(one["models"].get(model)) for model in models),
            nats(one["kl_geometric_mean"]),
        ]
        for one in seeds
    ]
    return head, body


def both(found: Document | None) -> str:
    """Exact match and KL of a cell."""
    return "" if found is None else f"{points(found['accuracy'])} ({nats(found['kl'])})"


def kinds(rows: Sequence[Document], names: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """Exact match by kind of question."""
    asked = rows[0]["kinds"]
    head = ["format", "method", *(f"{name} ({asked[name]['questions']})" for name in asked)]
    body = [
        [
            names[row["format"]],
            "full precision" if row["method"] == FULL else row["method"],
            *(f"{100 * row['kinds'][name]['accuracy']:.1f}" for name in asked),
        ]
        for row in rows
    ]
    return head, body


def pair_rows(pairs: Sequence[Document], names: Mapping[str, str]) -> Iterator[list[str]]:
    """One line per pair of methods."""
    for pair in pairs:
        if pair["against"] == FULL:
            continue
        test = pair["mcnemar"]
        yield [
            names[pair["format"]],
            f"{pair['method']} - {pair['against']}",
            interval(pair["accuracy"], signed_points),
            f"{test['only_first']} / {test['only_second']}",
            f"{test['p']:.2g}",
            interval(pair["kl"], signed_nats),
        ]


def draws(rows: Sequence[Document], names: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """Every calibration draw of the shipped weights, where there is more than one."""
    found: dict[tuple[str, str], dict[int, Document]] = {}
    for row in rows:
        own = {"accuracy": row["accuracy"]["value"], "kl": row["kl"][ANSWER]["mean"]["value"]}
        found.setdefault((row["format"], row["method"]), {})[row["draw"]] = own
    count = max((1 + max(own) for own in found.values()), default=1)
    head = ["format", "method", *(f"draw {draw}" for draw in range(count))]
    body = [
        [names[name], method, *(both(own.get(draw)) for draw in range(count))]
        for (name, method), own in found.items()
        if len(own) > 1
    ]
    return head, body


def missing(document: Document) -> str:
    """Name what is not measured: formats that the release lacked, and cells."""
    names = titles(document)
    absent = [one["title"] for one in document["setup"]["formats"].values() if not one["measured"]]
    lines = [f"- {title}: no such number format in this release" for title in absent]
    cells: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for cell in document["not_measured"]:
        place = (cell["model"], cell["variant"], names[cell["format"]])
        found = cells.setdefault(place, {})
        found.setdefault(cell["method"], []).append(str(cell["draw"]))
    for place, methods in cells.items():
        listed = (f"{method} (draw {', '.join(own)})" for method, own in methods.items())
        lines.append(f"- {' '.join(place)}: {', '.join(listed)}")
    return "\n".join(["## Not measured\n", *lines]) + "\n" if lines else ""


def versions(setup: Document, rows: Sequence[Document]) -> str:
    """Say what made the figures."""
    made = ", ".join(f"{name} {version}" for name, version in setup["versions"].items())
    return (
        f"Made with {made}. Full precision was run by the same code. "
        f"The switches of each method and the hash of the sources of each of {len(rows)} rows are in quality.json.\n"
    )


def interval(found: Document, form: Any) -> str:
    """``92.1 [91.3, 92.9]``."""
    value, low, high = (form(found[name]) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def points(share: float) -> str:
    """A share in percent, without the sign."""
    return f"{100 * share:.2f}"


def signed_points(share: float) -> str:
    """A difference of shares in points."""
    return f"{100 * share:+.2f}"


def nats(value: float) -> str:
    """A divergence: two digits, from 1e-6 to 10."""
    return f"{value:.4f}" if value >= 1e-3 else f"{value:.1e}"


def signed_nats(value: float) -> str:
    """A difference of divergences."""
    sign = "-" if value < 0 else "+"
    return f"{sign}{nats(abs(value))}"


def percent(share: float, *, digits: int = 1, unit: str = " %") -> str:
    """A share in percent."""
    return f"{100 * share:.{digits}f}{unit}"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table; nothing without a line."""
    lines = [*body]
    if not lines:
        return "Not measured.\n"
    return (
        "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines]) + "\n"
    )
