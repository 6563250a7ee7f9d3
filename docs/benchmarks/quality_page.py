"""The Markdown page of quality.json: tables, and sentences that the protocol allows."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from mbq_export.evaluate.quality import established

Document = Mapping[str, Any]
VARIANTS: Final = {
    "plain": "Sample model",
    "stress": "Stress variant (synthetic outliers)",
}
METHODS: Final = {
    "fp": "full precision",
    **{name: name for name in ("rtn", "awq", "mbq", "gptq", "mbq+")},
}
MODALITIES: Final = ("answer", "vision", "prompt")

HEAD: Final = """\
# Task quality of W3 on the sample model

Made by `python -m docs.benchmarks.quality`, which writes this page and [quality.json](quality.json). Exact match on
{questions} questions about {images} generated pictures that nothing was trained, calibrated or tuned on
(evaluation draw {evaluation_seed}); answering without looking gives {blind}. Decoder linears in {scheme}, vision tower,
embedding and head in 16 bits; weights dequantized in torch, {device}. Calibration: {samples} samples of
`{data}`, {seeds} draws; tables show draw 0. Intervals are 95 %, bootstrapped over pictures. KL is to full precision,
in nats, per position of a modality; lower is better. What the model predicts at vision and prompt positions nobody
asks for and nothing trained; it shows how far the stream has moved there.

The model is small and has no outlier channels, so 3 bits hardly hurt it. The stress variant computes the same
function with outlier channels put in by hand (`samples/tiny_vlm/stress.py`); it was chosen for its effect on rounding
and is a fixture: **nothing on this page is evidence for a method on real models.**
"""


def page(document: Document) -> str:
    """Return the page.

    Args:
        document: Contents of quality.json.
    """
    setup, rows = document["setup"], document["rows"]
    parts = [
        HEAD.format(
            questions=f"{rows[0]['questions']:,}",
            images=setup["evaluation"]["images"],
            evaluation_seed=setup["evaluation"]["seed"],
            blind=percent(setup["blind_accuracy"]),
            scheme=setup["scheme"],
            device=setup["device"],
            samples=setup["calibration"]["samples"],
            data=setup["calibration"]["data"],
            seeds=setup["calibration"]["seeds"],
        )
    ]
    if setup["remark"]:
        parts.append(f"**Remark.** {setup['remark']}\n")
    for variant, title in VARIANTS.items():
        own = [row for row in rows if row["variant"] == variant]
        pairs = [pair for pair in document["pairs"] if pair["variant"] == variant]
        parts += [
            f"## {title}\n",
            "### Accuracy and distance\n",
            table(ACCURACY_HEAD, accuracy_rows(own, pairs)),
            "### Accuracy by kind of question, %\n",
            table(*kinds(own)),
            "### Methods against each other, on the same questions\n",
            table(PAIR_HEAD, pair_rows(pairs)),
            "### Every calibration draw\n",
            table(*draws(own, setup["calibration"]["seeds"])),
        ]
    parts += [
        "## What may be said\n",
        "\n".join(sentences(document["pairs"])) + "\n",
        versions(setup),
    ]
    return "\n".join(parts)


ACCURACY_HEAD: Final = (
    "group",
    "method",
    "exact match, %",
    "minus full precision, points",
    "KL answers [95 %]",
    "KL vision",
    "KL prompt",
    "p99 answers",
    "same top token, answers, %",
)
PAIR_HEAD: Final = (
    "group",
    "second - first",
    "accuracy, points [95 %]",
    "only first / only second right",
    "McNemar p",
    "KL answers [95 %]",
)


def accuracy_rows(rows: Sequence[Document], pairs: Sequence[Document]) -> Iterator[list[str]]:
    """One line per model of draw 0."""
    to_full = {key(p): p["accuracy"] for p in pairs if p["against"] == "fp"}
    for row in rows:
        if row["seed"]:
            continue
        full = row["method"] == "fp"
        kl = row["kl"]
        yield [
            "-" if full else str(row["group"]),
            METHODS[row["method"]],
            interval(row["accuracy"], 100, "{:.2f}"),
            "" if full else interval(to_full[key(row)], 100, "{:+.2f}"),
            "" if full else interval(kl["answer"]["mean"], 1, "{:.4f}"),
            *("" if full else f"{kl[m]['mean']['value']:.4f}" for m in ("vision", "prompt")),
            "" if full else f"{kl['answer']['p99']:.3f}",
            "" if full else percent(kl["answer"]["same_top_token"], digits=2, unit=""),
        ]


def kinds(rows: Sequence[Document]) -> tuple[list[str], list[list[str]]]:
    """Accuracy by kind of question, draw 0."""
    names = list(rows[0]["kinds"])
    head = ["group", "method", *(f"{n} ({rows[0]['kinds'][n]['questions']})" for n in names)]
    body = [
        [
            "-" if row["method"] == "fp" else str(row["group"]),
            METHODS[row["method"]],
            *(f"{100 * row['kinds'][name]['accuracy']:.1f}" for name in names),
        ]
        for row in rows
        if not row["seed"]
    ]
    return head, body


def pair_rows(pairs: Sequence[Document]) -> Iterator[list[str]]:
    """One line per pair of methods, draw 0."""
    for pair in pairs:
        if pair["seed"] or pair["against"] == "fp":
            continue
        test = pair["mcnemar"]
        yield [
            str(pair["group"]),
            f"{pair['method']} - {pair['against']}",
            interval(pair["accuracy"], 100, "{:+.2f}"),
            f"{test['only_first']} / {test['only_second']}",
            f"{test['p']:.2g}",
            interval(pair["kl"], 1, "{:+.4f}"),
        ]


def draws(rows: Sequence[Document], seeds: int) -> tuple[list[str], list[list[str]]]:
    """Accuracy and KL of every calibration draw, and the geometric mean of KL."""
    head = ["group", "method", *(f"draw {seed}" for seed in range(seeds)), "KL, geometric mean"]
    models: dict[tuple[int, str], list[Document]] = {}
    for row in rows:
        if row["method"] not in {"fp", "rtn"}:
            models.setdefault((row["group"], row["method"]), []).append(row)
    body = []
    for (group, method), own in models.items():
        nats = [row["kl"]["answer"]["mean"]["value"] for row in own]
        cells = [
            f"{100 * r['accuracy']['value']:.2f} % ({n:.4f})"
            for r, n in zip(own, nats, strict=True)
        ]
        mean = float(np.exp(np.mean(np.log(nats))))
        body.append([str(group), method, *cells, f"{mean:.4f}"])
    return head, body


def sentences(pairs: Sequence[Document]) -> Iterator[str]:
    """State differences that every draw shows with an interval that excludes zero; say where none is shown."""
    groups: dict[tuple[str, int, str, str], list[Document]] = {}
    for pair in pairs:
        if pair["against"] != "fp":
            name = (pair["variant"], pair["group"], pair["against"], pair["method"])
            groups.setdefault(name, []).append(pair)
    yield (
        "A difference is stated only if it has the same sign in every draw and every paired 95 % interval "
        "excludes zero. The draws share one exam and every line below is a look of its own, so a single small "
        "difference among many lines may still be chance.\n"
    )
    for (variant, group, first, second), own in groups.items():
        found = [
            f"{what} {verdict(established([pair[measure] for pair in own]), better)}"
            for measure, what, better in (("accuracy", "accuracy", 1), ("kl", "KL", -1))
        ]
        yield f"- {variant}, g{group}, {second} against {first}: {'; '.join(found)}."


def verdict(sign: int, better: int) -> str:
    """Put a sign into words."""
    return {0: "no difference established", better: "better", -better: "worse"}[sign]


def versions(setup: Document) -> str:
    """Say what made the figures."""
    made = ", ".join(f"{name} {version}" for name, version in setup["versions"].items())
    return (
        f"\nMade with {made}; sources `{setup['code'][:16]}`; model `{setup['model_sha256'][:16]}`. Full precision was run "
        "by the same code. The switches of each method are in quality.json.\n"
    )


def key(row: Document) -> tuple[Any, ...]:
    """Identity of a model."""
    return row["variant"], row["group"], row["method"], row["seed"]


def interval(found: Document, factor: float, form: str) -> str:
    """``92.1 [91.3, 92.9]``."""
    value, low, high = (form.format(factor * found[name]) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def percent(share: float, *, digits: int = 1, unit: str = " %") -> str:
    """A share in percent."""
    return f"{100 * share:.{digits}f}{unit}"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
