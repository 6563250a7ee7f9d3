"""The search on rows that rounded blocks leave, unit after unit, one candidate at a time.

Every step of METHODS 6.6 in its own lines: nothing is kept between candidates, folding and rounding are written down
anew. Shares with the package only what runs a block on a batch.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mbq_export.blocks.stream import Batch, BlockStream
from mbq_export.families.base import ANSWER, PAD, VISION
from tests.reference import published

UNITS = {
    "qkv": (("q_proj", "k_proj", "v_proj"), "self_attn", "input_layernorm", "attn"),
    "o": (("o_proj",), "self_attn.o_proj", "self_attn.v_proj", "attn"),
    "gate_up": (("gate_proj", "up_proj"), "mlp", "post_attention_layernorm", "mlp"),
    "down": (("down_proj",), "mlp.down_proj", "mlp.up_proj", "mlp"),
}
"""Linears, where errors are read, what is divided by the scale, and whose ratio counts."""


@dataclass(frozen=True)
class Chosen:
    """What one unit got."""

    alpha: float
    curve: list[float]


def rounded(weight: Tensor, *, bits: int, group_size: int) -> Tensor:
    """Nearest codes of a range that holds zero, on a scale that is an fp16 number."""
    top = 2**bits - 1
    groups = weight.float().reshape(-1, group_size)
    low = groups.amin(1, keepdim=True).clamp(max=0)
    high = groups.amax(1, keepdim=True).clamp(min=0)
    step = ((high - low) / top).clamp(min=2**-14).half().float()
    zero = torch.round(-low / step).clamp(0, top)
    codes = (torch.round(groups / step) + zero).clamp(0, top)
    return ((codes - zero) * step).reshape(weight.shape)


def scale(rows: Tensor, alpha: float) -> Tensor:
    """Mean |x| to the power alpha, its extremes multiplying to one."""
    e = rows.abs().mean(0).pow(alpha).clamp(min=1e-4)
    return e / (e.max() * e.min()).sqrt()


def linears_of(block: nn.Module) -> list[nn.Linear]:
    """All linears of a block."""
    return [module for module in block.modules() if isinstance(module, nn.Linear)]


def all_rounded(block: nn.Module, *, bits: int, group_size: int) -> nn.Module:
    """A copy whose linears are rounded."""
    found = copy.deepcopy(block)
    for linear in linears_of(found):
        linear.weight.copy_(rounded(linear.weight, bits=bits, group_size=group_size))
    return found


def noted(stream: BlockStream, block: nn.Module, index: int, path: str, pairs: list) -> list[tuple]:
    """Arguments and outputs of a module while a block runs."""
    seen: list[tuple] = []
    handle = block.get_submodule(path).register_forward_hook(
        lambda _m, args, named, out: seen.append((args, named, out)), with_kwargs=True
    )
    for batch, hidden in pairs:
        stream.run(block, index, batch, hidden)
    handle.remove()
    return seen


@torch.no_grad()
def search(
    stream: BlockStream,
    batches: tuple[Batch, ...],
    ratios: dict[str, float],
    *,
    bits: int,
    group_size: int,
) -> list[dict[str, Chosen]]:
    """Search every unit of every block."""
    exact = [batch.hidden for batch in batches]
    moved = [batch.hidden for batch in batches]
    classes = torch.cat([batch.classes.flatten() for batch in batches])
    found = []
    for index in range(len(stream)):
        with stream.block(index) as block, stream.block(index) as folded:
            of_block = {}
            for unit, (names, reads, source, half) in UNITS.items():
                before = noted(stream, block, index, reads, list(zip(batches, exact, strict=True)))
                now = all_rounded(folded, bits=bits, group_size=group_size)
                first = f"{reads.split('.')[0]}.{names[0]}"
                read = [
                    args[0]
                    for args, _, _ in noted(
                        stream, now, index, first, list(zip(batches, moved, strict=True))
                    )
                ]
                rows = torch.cat([part.flatten(0, 1) for part in read])[classes != PAD]
                curve = []
                for step in range(21):
                    e = scale(rows, step / 20)
                    trial = copy.deepcopy(block)
                    owner = trial.get_submodule(reads.split(".")[0])
                    for name in names:
                        linear = owner.get_submodule(name)
                        linear.weight.copy_(
                            rounded(linear.weight * e, bits=bits, group_size=group_size) / e
                        )
                    change = []
                    for (_, named, out), part in zip(before, read, strict=True):
                        others = {k: v for k, v in named.items() if k != "hidden_states"}
                        after = trial.get_submodule(reads)(part, **others)
                        pair = [x[0] if isinstance(x, tuple) else x for x in (out, after)]
                        change.append((pair[0] - pair[1]).flatten(0, 1))
                    curve.append(
                        published.balanced_mae(
                            torch.cat(change), classes == VISION, classes == ANSWER, ratios[half]
                        )
                    )
                best = curve.index(min(curve))
                fold(folded, scale(rows, best / 20), names, reads, source)
                of_block[unit] = Chosen(best / 20, curve)
            now = all_rounded(folded, bits=bits, group_size=group_size)
            exact = [stream.run(block, index, b, x) for b, x in zip(batches, exact, strict=True)]
            moved = [stream.run(now, index, b, x) for b, x in zip(batches, moved, strict=True)]
        found.append(of_block)
    return found


def fold(block: nn.Module, e: Tensor, names: tuple[str, ...], reads: str, source: str) -> None:
    """Multiply what reads, divide what is read."""
    owner = block.get_submodule(reads.split(".", maxsplit=1)[0])
    for name in names:
        owner.get_submodule(name).weight.mul_(e)
    divided = block.get_submodule(source)
    divided.weight.div_(e if divided.weight.dim() == 1 else e[:, None])
    if getattr(divided, "bias", None) is not None:
        divided.bias.div_(e)
