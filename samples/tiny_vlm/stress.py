"""Write a model folder with synthetic outlier channels: python -m samples.tiny_vlm.stress OUT.

OUT answers exactly like the folder it was made from, in float32, and is harder to quantize. It is
a fixture, made by hand: see mbq_export/calibrate/stress.py before you quote a number measured on it.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Final

import torch

from mbq_export.calibrate.shapes import CalibrationMix, calibration_samples
from mbq_export.calibrate.stress import STRESS, Stressed, apply_stress
from mbq_export.writing import partial_path, publish
from samples.tiny_vlm.evaluate import load_model
from samples.tiny_vlm.inputs import HandMade

WEIGHTS: Final = Path(__file__).parent / "weights"
LEANING_SAMPLES: Final = 48
LEANING_SEED: Final = 1
"""Not the default calibration draw: the fixture must not know what a method will calibrate on."""

CARD: Final = """\
# Synthetic outliers

Made from tiny-llava-ov by multiplying {channels} activation channels of {places} places by up to {gain:.0f} and dividing
the weights that read them. It computes the same function and is harder to quantize. This is a test
fixture, chosen for its effect; it says nothing about which method is better on real models.
"""


def stressed_folder(source: Path, out: Path) -> list[Stressed]:
    """Write the stressed form of `source` to `out`.

    Args:
        source: A tiny-llava-ov folder.
        out: Where the float32 folder goes; an old one is replaced.
    """
    model, processor = load_model(source), HandMade(source)
    samples = calibration_samples(LEANING_SAMPLES, seed=LEANING_SEED, mix=CalibrationMix.CAPTIONS)
    inputs = [processor.inputs(s.prompt, s.image, s.answer) for s in samples]
    places = apply_stress(model, inputs)
    partial = partial_path(out)
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    for file in sorted(source.iterdir()):
        if not (partial / file.name).exists():
            shutil.copyfile(file, partial / file.name)
    label_as_synthetic(partial, places)
    publish(partial, out)
    return places


def label_as_synthetic(folder: Path, places: list[Stressed]) -> None:
    """Say what was done, in config.json and in a README."""
    config = folder / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["synthetic_outliers"] = {
        "share": STRESS.share,
        "vision_gain": STRESS.vision_gain,
        "text_gain": STRESS.text_gain,
        "spread": STRESS.spread,
        "seed": STRESS.seed,
    }
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    text = CARD.format(
        channels=sum(int((place.factors != 1).sum()) for place in places),
        places=len(places),
        gain=max(float(place.factors.max()) for place in places),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Write the folder and print how far the channels now spread."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, default=WEIGHTS)
    chosen = parser.parse_args()
    torch.set_num_threads(2)
    for place in stressed_folder(chosen.model, chosen.out):
        print(
            f"block {place.block} {place.unit:8} largest/median channel "
            f"{place.outlier_ratio_before:6.1f} -> {place.outlier_ratio_after:6.1f}"
        )


if __name__ == "__main__":
    main()
