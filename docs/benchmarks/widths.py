"""Make widths.json and widths.md beside this file: run ``python -m docs.benchmarks.widths --work DIR``.

Does the error that widths are chosen by predict what rounding a unit costs? On the sample model every unit is rounded
to 3 bits alone, everything else in full precision, and the divergence at answers is compared with the prediction. Then
the whole decoder at averages from 3 to 4, chosen, and with the same bits given to the units that gain least.
"""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from mbq_export import __version__
from mbq_export.backends.torch import fake_quant_model
from mbq_export.calibrate import Recipe, calibrate
from mbq_export.calibrate.data import encode, read_manifest
from mbq_export.calibrate.methods import METHODS
from mbq_export.calibrate.shapes import evaluation_scenes
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.evaluate.packed import encoder
from mbq_export.evaluate.quality import ANSWER, Exam
from mbq_export.families import FAMILIES
from mbq_export.families.base import LoadedModel
from mbq_export.quantize import quantize
from mbq_export.quantize.feedback import Samples
from mbq_export.quantize.widths import MixedBits
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.oracle import dequantized
from mbq_export.writing import json_bytes, write_file
from samples.tiny_vlm.stress import WEIGHTS

if TYPE_CHECKING:
    from mbq_export.channel_scales import ChannelScales

HERE: Final = Path(__file__).parent
SCHEMA: Final = "mbq-export/widths@1"
SCHEME: Final = SCHEMES["w3a16"]
AVERAGES: Final = (3.0, 3.3, 3.5, 3.7, 4.0)


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Correlation of the ranks of two samples without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


class Bench:
    """One method on the sample model."""

    def __init__(self, method: str, options: argparse.Namespace) -> None:
        """Calibrate, and let full precision take the exam."""
        self.model: LoadedModel = FAMILIES["llava_onevision"].load(WEIGHTS)
        data = read_manifest("builtin:shapes", samples=options.samples, held_out=0, seed=0)
        self.samples = Samples(inputs=encode(data.samples, self.model.processor))
        self.group, self.work = options.group, options.work
        recipe = Recipe(
            scheme=SCHEME,
            group_size=options.group,
            switches=METHODS[method].switches,
            for_widths=True,
        )
        self.scales: ChannelScales = calibrate(self.model, self.samples.inputs, recipe)
        scenes = list(evaluation_scenes(options.images, seed=options.seed))
        self.exam = Exam(self.model.module, scenes, encoder(self.model.processor.tokenizer))

    def checkpoint(
        self, name: str, mixed: MixedBits | None, *, rounded: bool = True
    ) -> QuantCheckpoint:
        """Quantize."""
        out = self.work / name
        shutil.rmtree(out, ignore_errors=True)
        return quantize(
            self.model,
            self.scales,
            scheme=SCHEME if rounded else None,
            group_size=self.group,
            out=out,
            samples=self.samples,
            mixed=mixed,
        )

    def divergence(self, model: LoadedModel) -> float:
        """Mean KL to full precision at answers, in nats."""
        return float(self.exam.take(model.module).distances[ANSWER].nats.mean())

    def alone(self, units: list[Mapping[str, Any]]) -> list[float]:
        """Divergence with one unit at 3 bits and everything else in full precision, for every unit."""
        exact = fake_quant_model(self.checkpoint("exact", None, rounded=False))
        narrow = self.checkpoint("narrow", None)
        into = {place.unit: place.into for place in self.model.family.smooth}
        found = []
        for unit in units:
            paths = [
                self.model.family.linear_path(unit["layer"], linear)
                for linear in into[unit["unit"]]
            ]
            kept = {}
            for path in paths:
                weight = exact.module.get_parameter(f"{path}.weight")
                kept[path] = weight.data.clone()
                values = dequantized(narrow.packed(path)).astype(np.float32)
                weight.data.copy_(weight.data.new_tensor(values))
            found.append(self.divergence(exact))
            for path, data in kept.items():
                exact.module.get_parameter(f"{path}.weight").data.copy_(data)
            print(f"{unit['layer']} {unit['unit']}: {unit['error']['3']:.3g} {found[-1]:.3g}")
        return found

    def mixtures(self) -> list[dict[str, Any]]:
        """Divergence at averages from 3 to 4, and of the opposite choice with as many bits."""
        rows = []
        for average in AVERAGES:
            checkpoint = self.checkpoint("mixed", MixedBits(avg_bits=average))
            told = checkpoint.info["mixed"]
            row = {
                "asked": average,
                "average_bits": told["average_bits"],
                "predicted": told["predicted"]["chosen"],
                "kl": self.divergence(fake_quant_model(checkpoint)),
            }
            opposite = _opposite(told)
            if opposite:
                other = self.checkpoint("opposite", MixedBits(patterns=opposite))
                row["opposite"] = {
                    "average_bits": other.info["mixed"]["average_bits"],
                    "kl": self.divergence(fake_quant_model(other)),
                }
            print(row)
            rows.append(row)
        return rows


def _opposite(told: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    """4 bits for the units with the smallest gain per bit, until as many are spent; none where nothing was chosen."""
    wide = sum(row["cost"]["4"] - row["cost"]["3"] for row in told["units"] if row["bits"] == 4)
    order = sorted(
        told["units"],
        key=lambda row: (
            (row["error"]["3"] - row["error"]["4"]) / (row["cost"]["4"] - row["cost"]["3"])
        ),
    )
    globs = {
        "qkv": "self_attn.[qkv]_proj",
        "o": "self_attn.o_proj",
        "gate_up": "mlp.[gu]*_proj",
        "down": "mlp.down_proj",
    }
    patterns = []
    for row in order:
        extra = row["cost"]["4"] - row["cost"]["3"]
        if extra <= wide:
            wide -= extra
            patterns.append((f"layers.{row['layer']}.{globs[row['unit']]}", 4))
    return () if len(patterns) in {0, len(order)} else tuple(patterns)


def bench(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one method."""
    setting = Bench(method, options)
    units = setting.checkpoint("all", MixedBits(avg_bits=3.0)).info["mixed"]["units"]
    divergences = setting.alone(units)
    predicted = np.array([unit["error"]["3"] for unit in units])
    return {
        "method": method,
        "spearman": round(spearman(predicted, np.array(divergences)), 4),
        "units": [
            {"layer": u["layer"], "unit": u["unit"], "error": u["error"]["3"], "kl": kl}
            for u, kl in zip(units, divergences, strict=True)
        ],
        "mixtures": setting.mixtures(),
    }


def page(found: Mapping[str, Any]) -> str:
    """The page of a result."""
    setting = (
        f"Sample model, groups of {found['group']}, {found['samples']} calibration samples, {found['pictures']} evaluation "
        "pictures. Made by `python -m docs.benchmarks.widths --work DIR`; numbers in [widths.json](widths.json)."
    )
    alone = (
        "One unit is rounded to 3 bits, everything else stays in full precision. *Rank correlation* is Spearman's, of the "
        "predicted error with the divergence (KL, nats at answers) that this makes, over all units."
    )
    whole = (
        "The whole decoder: widths as chosen, and the opposite choice: at most as many more bits, for the units that gain "
        "least by each."
    )
    lines = [
        "# What a unit at 3 bits costs, predicted and measured",
        "",
        setting,
        "",
        alone,
        "",
        "| method | units | rank correlation |",
        "|---|---|---|",
        *(
            f"| `{r['method']}` | {len(r['units'])} | {r['spearman']:.2f} |"
            for r in found["results"]
        ),
        "",
        whole,
        "",
        "| method | asked | average | KL chosen | average | KL of the opposite |",
        "|---|---|---|---|---|---|",
    ]
    for result in found["results"]:
        for row in result["mixtures"]:
            other = row.get("opposite")
            told = f"{other['average_bits']:.3f} | {other['kl']:.5f}" if other else "- | -"
            lines.append(
                f"| `{result['method']}` | {row['asked']:g} | {row['average_bits']:.3f} | {row['kl']:.5f} | {told} |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["rtn", "mbq"])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    found = {
        "schema": SCHEMA,
        "version": __version__,
        "group": options.group,
        "samples": options.samples,
        "pictures": options.images,
        "seed": options.seed,
        "results": [bench(method, options) for method in options.methods],
    }
    write_file(options.out / "widths.json", json_bytes(found))
    write_file(options.out / "widths.md", page(found).encode())


if __name__ == "__main__":
    main()
