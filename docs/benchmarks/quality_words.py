"""What the page of quality.json says in words: targets met and missed, and which differences are established."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from mbq_export.evaluate.quality import established

HEAD: Final = """\
# Task quality of the methods on the sample model

Made by `python -m docs.benchmarks.quality`, which writes this page and [quality.json](quality.json). Exact match on
{questions} questions about {images} generated pictures that nothing was trained, calibrated or tuned on
(evaluation draw {evaluation_seed}); answering without looking gives {blind}. Decoder linears are quantized; vision tower,
embedding and head keep 16 bits. Weights are dequantized in torch, {device}; formats with A8 round activations as the
engines do. Calibration: {samples} samples of `{data}`; tables show calibration draw 0 of {draws} and the shipped
weights, unless they say otherwise. Training seeds: {count}: {names}. Intervals are 95 %, bootstrapped over pictures;
differences are paired on the same questions. KL is to full precision, in nats, per position of a modality; lower is
better. What the model predicts at vision and prompt positions nobody asks for and nothing trained; it shows how far
the stream has moved there.

The model is small and has no outlier channels, so 3 bits hardly hurt it. The stress variant computes the same
function with outlier channels put in by hand (`samples/tiny_vlm/stress.py`); it was chosen for its effect on rounding
and is a fixture: **nothing on this page is evidence for a method on real models.**
"""

STATED: Final = (
    "A difference is stated only if it has the same sign in every training seed and every calibration draw that was "
    "measured and every paired 95 % interval excludes zero. The cells share one exam and every line below is a look of "
    "its own, so a single small difference among many may still be chance. What is listed under *no difference "
    "established* did not help there as far as this exam can tell.\n"
)


def reached(targets: Sequence[Mapping[str, Any]]) -> str:
    """Say of each target whether it was met."""
    lines = []
    for one in targets:
        if one["met"] is None:
            outcome = "not measured"
        else:
            outcome = f"{'met' if one['met'] else '**missed**'}: {_value(one, one['value'])}"
        each = ", ".join(f"{name} {_value(one, value)}" for name, value in one["values"].items())
        title = "" if one["kind"] == "target" else f" ({one['kind']})"
        lines.append(
            f"- {one['variant']}, {one['format']}{title}: {one['rule']}: {outcome}"
            + (f" ({each})." if each else ".")
        )
    return "\n".join(lines) + "\n"


def _value(target: Mapping[str, Any], value: float) -> str:
    return f"{100 * value:+.2f} points lost" if "exact match" in target["rule"] else f"{value:.3f}"


def findings(pairs: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> Iterator[str]:
    """State differences that every seed and draw shows with an interval that excludes zero; say where none is shown.

    Args:
        pairs: Of quality.json.
        titles: Formats as people read them, in their order.
    """
    yield STATED
    groups: dict[tuple[str, str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for pair in pairs:
        if pair["against"] != "fp":
            name = (pair["variant"], pair["against"], pair["method"])
            groups.setdefault(name, {}).setdefault(pair["format"], []).append(pair)
    for (variant, first, second), formats in groups.items():
        said = [
            f"{what} {_where(formats, titles, measure, better)}"
            for measure, what, better in (("kl", "KL", -1), ("accuracy", "exact match", 1))
        ]
        yield f"- {variant}, {second} against {first}: {'; '.join(said)}."


def _where(
    formats: Mapping[str, Sequence[Mapping[str, Any]]],
    titles: Mapping[str, str],
    measure: str,
    better: int,
) -> str:
    """Formats by verdict."""
    verdicts: dict[str, list[str]] = {"better": [], "worse": [], "no difference established": []}
    for name, title in titles.items():
        if name in formats:
            sign = established([pair[measure] for pair in formats[name]])
            verdict = {better: "better", -better: "worse", 0: "no difference established"}[sign]
            verdicts[verdict].append(title)
    return ", ".join(
        f"{verdict} ({', '.join(where)})" for verdict, where in verdicts.items() if where
    )
