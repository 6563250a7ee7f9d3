"""Dependency of two sites, and ratios of several halves, number by number and model by model. Nothing here is fast."""

import itertools
import math

import torch
from torch import Tensor, nn

from mbq_export.families.base import ANSWER, PAD, PROMPT, VISION
from mbq_export.families.inputs import ModelInputs
from tests.reference.clip import real
from tests.reference.feedback import Format

RATIOS = (1.0, 0.995, 0.99, 0.985, 0.98)
KINDS = {"attn": "self_attn.", "mlp": "mlp."}


def shares(x: float, levels: list[float]) -> list[float]:
    """Soft assignment of one number to evenly spaced levels."""
    step = levels[1] - levels[0]
    powers = [math.exp(-((x - level) ** 2) / step) for level in levels]
    return [power / sum(powers) for power in powers]


def levels_of(numbers: list[float], bits: int) -> tuple[list[float], list[float]]:
    """Numbers in standard deviations, and levels over their range."""
    mean = sum(numbers) / len(numbers)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in numbers) / len(numbers))
    scaled = [x / deviation for x in numbers]
    low, high = min(scaled), max(scaled)
    count = 2**bits
    return scaled, [low + (high - low) * m / (count - 1) for m in range(count)]


def dependency(first: list[float], second: list[float], bits: int) -> tuple[float, float]:
    """Conditional entropy of the second given the first, and their mutual information, in nats."""
    sites = [levels_of(numbers, bits) for numbers in (first, second)]
    p, q = ([shares(x, levels) for x in scaled] for scaled, levels in sites)
    count = 2**bits
    joint = [
        [sum(a[m] * b[n] for a, b in zip(p, q, strict=True)) / len(first) for n in range(count)]
        for m in range(count)
    ]
    conditional = entropy = 0.0
    for m, n in itertools.product(range(count), repeat=2):
        if joint[m][n] > 0:
            conditional -= joint[m][n] * math.log(joint[m][n] / sum(joint[m]))
    for n in range(count):
        column = sum(row[n] for row in joint)
        entropy -= column * math.log(column) if column > 0 else 0.0
    return conditional, entropy - conditional


@torch.no_grad()
def rows_behind(
    model: nn.Module, blocks: str, site: str, inputs: list[ModelInputs]
) -> list[Tensor]:
    """Residual rows (T, hidden) of each sample behind a half of the whole model."""
    layer, kind = site.split(".")
    block = model.get_submodule(f"{blocks}.{layer}")
    seen: list[Tensor] = []
    if kind == "attn":
        handle = block.get_submodule("post_attention_layernorm").register_forward_pre_hook(
            lambda _module, args: seen.append(args[0][0].clone())
        )
    else:
        handle = block.register_forward_hook(
            lambda _module, _args, out: seen.append(
                (out[0] if isinstance(out, tuple) else out)[-1:][0]
            )
        )
    for sample in inputs:
        model(**sample.tensors(), use_cache=False)
    handle.remove()
    return seen


def objective(
    wanted: list[Tensor], found: list[Tensor], inputs: list[ModelInputs], weights: dict[int, float]
) -> float:
    """Balanced mean absolute error, token by token; only classes with a weight count."""
    total = count = 0.0
    for target, rows, sample in zip(wanted, found, inputs, strict=True):
        for token, kind in enumerate(sample.token_classes.tolist()):
            if kind in weights:
                total += weights[kind] * float((target[token] - rows[token]).abs().double().sum())
                count += rows.shape[1]
    return total / count


@torch.no_grad()
def shrink(model: nn.Module, blocks: str, sites: list[str], ratios: tuple[float, ...], kind: Format,
           exact: dict[str, Tensor]) -> None:  # fmt: skip
    """Round the halves of some sites, each with its ratio, in place."""
    for site, ratio in zip(sites, ratios, strict=True):
        layer, half = site.split(".")
        for name, module in model.get_submodule(f"{blocks}.{layer}").named_modules():
            if isinstance(module, nn.Linear) and name.startswith(KINDS[half]):
                weight = exact[f"{blocks}.{layer}.{name}.weight"]
                parts = torch.split(weight, kind.group_size or weight.shape[1], dim=1)
                module.weight.copy_(torch.cat([real(part, ratio, kind) for part in parts], dim=1))


def all_objectives(
    model: nn.Module,
    blocks: str,
    sites: list[str],
    inputs: list[ModelInputs],
    weights: dict[int, float],
    kind: Format,
    tried: list[tuple[float, ...]],
) -> dict[tuple[float, ...], float]:
    """J of combinations: the whole model once more for each, rounded in these halves only."""
    exact = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = rows_behind(model, blocks, sites[-1], inputs)
    found = {}
    for ratios in tried:
        shrink(model, blocks, sites, ratios, kind, exact)
        found[ratios] = objective(
            wanted, rows_behind(model, blocks, sites[-1], inputs), inputs, weights
        )
    return found


CLASSES = {"pad": PAD, "prompt": PROMPT, "vision": VISION, "answer": ANSWER}
