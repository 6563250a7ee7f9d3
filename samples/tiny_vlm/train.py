"""Train tiny-llava-ov from nothing: python -m samples.tiny_vlm.train --out RUN.

RUN/model/           the finished Hugging Face folder
RUN/training.json    what happened: steps, losses, accuracy, seconds of wall and processor time
RUN/checkpoint/      the last saved state; --resume goes on from it

4.4 M parameters, one seed, about 41 minutes on two undisturbed cores with AVX-512 bf16.
"""

import argparse
import json
import logging
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mbq_export.calibrate.shapes import EVALUATION_SCENES, MONITOR_SCENES, Scene, make_scenes
from mbq_export.evaluate.packed import accuracy, answer_scenes, encoder, vision_states
from mbq_export.writing import json_bytes, partial_path, write_file
from samples.tiny_vlm.evaluate import load_model
from samples.tiny_vlm.model import build_model, build_tokenizer, write_folder
from samples.tiny_vlm.stages import (
    NO_KIND,
    Probe,
    Stage,
    align_stage,
    answer_stage,
    cell_labels,
    pixels_of,
    probe_stage,
)

logger = logging.getLogger(__name__)

STAGES: Final = (("probe", probe_stage), ("align", align_stage), ("answer", answer_stage))
MONITOR_IMAGES: Final = 150
EVERY: Final = {"probe": 250, "align": 250, "answer": 240}
"""Steps between two looks at the monitoring scenes, and two checkpoints."""


class Run:
    """One training run and its record, which a checkpoint carries along."""

    def __init__(self, folder: Path, seed: int) -> None:
        """Start a run in `folder` with random weights of `seed`."""
        self.folder = folder
        self.model = build_model(seed)
        self.probe = Probe(self.model.config.vision_config.hidden_size)
        self.monitor = list(make_scenes(MONITOR_IMAGES, seed=MONITOR_SCENES, held_out=True))
        self.record: dict[str, Any] = {
            "seed": seed,
            "machine": machine(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "stages": [],
        }

    def modules(self) -> torch.nn.ModuleDict:
        """Return everything with weights, under one roof for checkpoints."""
        return torch.nn.ModuleDict({"model": self.model, "probe": self.probe})

    def stage(self, name: str, steps: int | None) -> Stage:
        """Make a stage by name, with the recipe's steps unless told otherwise."""
        make = dict(STAGES)[name]
        return make(self.model, self.probe, **({} if steps is None else {"steps": steps}))

    def train(self, stage: Stage, *, resumed_at: int = 0) -> None:
        """Run the steps of one stage, watching the monitoring scenes on the way."""
        if not resumed_at:
            self.record["stages"].append(
                {"name": stage.name, "batch": stage.batch, "wall_s": 0.0, "cpu_s": 0.0, "log": []}
            )
        entry = self.record["stages"][-1]
        wall, cpu = time.monotonic(), time.process_time()
        for number in range(resumed_at, stage.steps):
            loss = stage.step(number)
            done = number + 1
            if done % EVERY[stage.name] and done != stage.steps:
                continue
            seen = self.look(stage.name)
            entry["log"].append({"step": done, "loss": round(loss, 5), **seen})
            entry["wall_s"] += round(time.monotonic() - wall, 1)
            entry["cpu_s"] += round(time.process_time() - cpu, 1)
            wall, cpu = time.monotonic(), time.process_time()
            spent = entry["wall_s"]
            logger.info("%s %s: wall %.0f s, %s", stage.name, done, spent, entry["log"][-1])
            save_checkpoint(self, stage, done)

    @torch.no_grad()
    def look(self, stage: str) -> dict[str, Any]:
        """Measure what a stage is about on the monitoring scenes (unseen digits)."""
        if stage == "answer":
            return exact_match(self.model, self.monitor)
        colors, kinds = cell_labels(self.monitor)
        color_logits, kind_logits = self.probe(vision_states(self.model, pixels_of(self.monitor)))
        shown = kinds < NO_KIND
        digits = shown & (kinds >= 6)
        right = kind_logits.argmax(-1) == kinds
        return {
            "color": round(float((color_logits.argmax(-1) == colors)[shown].float().mean()), 4),
            "kind": round(float(right[shown].float().mean()), 4),
            "unseen_digit": round(float(right[digits].float().mean()), 4),
        }

    def finish(self, images: int) -> None:
        """Write the folder, evaluate what it holds, write the record."""
        started = time.monotonic()
        target = self.folder / "model"
        write_folder(self.model, target)
        scenes = make_scenes(images, seed=EVALUATION_SCENES, held_out=True)
        encode = encoder(build_tokenizer())
        result = asdict(accuracy(answer_scenes(load_model(target), scenes, encode)))
        self.record["evaluation"] = {
            "first_scene": EVALUATION_SCENES,
            "images": images,
            "weights": "as written, float16 rounded, computed in float32",
            "wall_s": round(time.monotonic() - started, 1),
            **result,
        }
        write_file(self.folder / "training.json", json_bytes(self.record))
        logger.info("finished: %s", self.record["evaluation"])


def exact_match(model: Any, scenes: Sequence[Scene]) -> dict[str, Any]:
    """Return exact match overall and per kind of question, rounded for the log."""
    model.eval()
    result = accuracy(answer_scenes(model, scenes, encoder(build_tokenizer())), draws=1)
    model.train()
    kinds = {kind: round(share, 3) for kind, (share, _) in result.by_kind.items()}
    return {"exact_match": round(result.exact_match, 4), "by_kind": kinds}


def save_checkpoint(run: Run, stage: Stage, done: int) -> None:
    """Save weights, optimizer state and record after `done` steps of a stage."""
    # Shared tensors (the tied embeddings) are stored once, under the first of their names.
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in run.modules().state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[f"weights/{name}"] = tensor.contiguous()
    for index, optimizer in enumerate(stage.optimizers):
        for parameter, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"state/{index}/{parameter}/{key}"] = torch.as_tensor(value).contiguous()
    note = json.dumps({"stage": stage.name, "done": done, "record": run.record})
    folder = run.folder / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / "state.safetensors"
    save_file(tensors, partial_path(final), metadata={"note": note})
    partial_path(final).rename(final)


def load_checkpoint(run: Run) -> tuple[str, int, dict[str, Tensor]]:
    """Restore weights and record; return the stage, its finished steps and all tensors."""
    path = run.folder / "checkpoint" / "state.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        note = json.loads(file.metadata()["note"])
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k[0] == "w"}
    # Not strict: a tied tensor is stored under one of its names only.
    run.modules().load_state_dict(weights, strict=False)
    run.record = note["record"]
    return note["stage"], note["done"], tensors


def restore_optimizers(stage: Stage, tensors: dict[str, Tensor]) -> None:
    """Put saved optimizer state back."""
    for index, optimizer in enumerate(stage.optimizers):
        whole = optimizer.state_dict()
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "state" and rest.startswith(f"{index}/"):
                _, parameter, key = rest.split("/")
                whole["state"].setdefault(int(parameter), {})[key] = value
        optimizer.load_state_dict(whole)


def machine() -> dict[str, Any]:
    """Describe what the run's times and roundings depend on."""
    return {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of every stage; the recipe's if left out")
    parser.add_argument("--evaluation-images", type=int, default=900)
    return parser.parse_args()


def main() -> None:
    """Train, evaluate, write."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    chosen = options()
    torch.set_num_threads(chosen.threads)
    run = Run(chosen.out, chosen.seed)
    reached, done, tensors = load_checkpoint(run) if chosen.resume else ("probe", 0, {})
    if chosen.resume:
        cut = {"stage": reached, "step": done, "threads": chosen.threads}
        run.record.setdefault("resumed", []).append(cut)
    names = [name for name, _ in STAGES]
    for name in names[names.index(reached) :]:
        stage = run.stage(name, chosen.steps)
        if name == reached:
            restore_optimizers(stage, tensors)
        run.train(stage, resumed_at=done)
        done = 0
    run.finish(chosen.evaluation_images)


if __name__ == "__main__":
    main()
