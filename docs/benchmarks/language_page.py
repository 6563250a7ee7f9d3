"""The Markdown page of language.json."""

from collections.abc import Mapping
from typing import Any, Final

HEAD: Final = """\
# Text path on real language weights

Made by `python -m docs.benchmarks.language`, which writes this page and [language.json](language.json). SmolLM2-135M
(`{file}`, {hidden_note}), every decoder linear in {scheme} with groups of {group}, {device}. Calibration: {samples}
windows of {tokens} tokens and {held_out} held-out ones from one half of the topics of Python's language reference
(`pydoc_data.topics`, Python {python}); perplexity and KL to full precision on {windows} windows of the other half,
{positions} positions. Intervals are 95 %, bootstrapped over windows.

There are no pictures: the first {asked} tokens of a window count as its prompt, the rest as its answer, and vision tokens
weigh nothing. So this says how rounding copes with a language model's outlier channels, and nothing about balancing
modalities. One model, one calibration draw, few windows: read it as a check, not as a ranking.

| method | perplexity | nats lost per token [95 %] | KL to full precision [95 %] | seconds of the processor |
| --- | --- | --- | --- | --- |
"""


def page(document: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        document: Contents of language.json.
    """
    setup, rows = document["setup"], document["rows"]
    head = HEAD.format(
        file=setup["weights"]["file"],
        hidden_note="itself 4-bit: full precision here is what it stands for",
        scheme=setup["scheme"],
        group=setup["group"],
        device=setup["device"],
        samples=setup["calibration"]["windows"],
        held_out=setup["calibration"]["held_out"],
        tokens=setup["window_tokens"],
        python=setup["text"]["python"],
        windows=setup["evaluation"]["windows"],
        positions=f"{rows[0]['positions']:,}",
        asked=setup["prompt_tokens"],
    )
    lines = []
    for row in rows:
        full = row["method"] == "fp"
        cells = (
            "full precision" if full else row["method"],
            f"{row['perplexity']:.2f}",
            "" if full else interval(row["nll_lost"], "{:+.3f}"),
            "" if full else interval(row["kl"], "{:.3f}"),
            "" if full else f"{row['seconds']:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    made = ", ".join(f"{name} {version}" for name, version in setup["versions"].items())
    return head + "\n".join(lines) + f"\n\nMade with {made}; sources `{setup['code'][:16]}`.\n"


def interval(found: Mapping[str, float], form: str) -> str:
    """``0.12 [0.10, 0.14]``."""
    value, low, high = (form.format(found[name]) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
