"""Drawn tokens: which they are, and that a module computes for them what it computes among all."""

import pytest
import torch
from torch import Tensor

from mbq_export.blocks.stream import Batch, BlockStream
from mbq_export.calibrate.excerpt import NEVER, Drawn, Excerpt, draw, gather, joined, run
from mbq_export.families.base import ANSWER, PAD, VISION
from tests.questions import questions, tiny_model
from tests.tiny import Tiny

KINDS = (VISION, ANSWER)
ROUNDINGS = 2e-5
"""Attention with a written-out mask and filled-up sequences adds the same float32 numbers in another order."""


def batches_of(count: int = 6, tiny: Tiny | None = None) -> tuple[BlockStream, tuple[Batch, ...]]:
    model = tiny_model(tiny) if tiny else tiny_model()
    stream = BlockStream(model)
    return stream, stream.begin(questions(model, count))


def tokens_of(drawn: list[Drawn | None]) -> list[tuple[int, int, int, int, int]]:
    """Batch, sequence, place, rank and class of every drawn token."""
    return [
        (number, int(sequence), *values)
        for number, each in enumerate(drawn)
        if each is not None
        for row, sequence in enumerate(each.sequences)
        for values in zip(
            each.places[row].tolist(),
            each.ranks[row].tolist(),
            each.classes[row].tolist(),
            strict=True,
        )
        if values[1] != NEVER
    ]


@torch.no_grad()
def attention_excerpts(
    count: int = 6, masked: bool = False
) -> tuple[torch.nn.Module, list[Excerpt]]:
    stream, batches = batches_of(count)
    drawn = draw(batches, per_class=25, kinds=KINDS, seed=[4])
    found = []
    with stream.block(0) as block:
        for batch, each in zip(batches, drawn, strict=True):
            assert each is not None
            named = dict(batch.arguments[0])
            if masked:
                length = batch.hidden.shape[1]
                named["attention_mask"] = torch.ones(length, length).tril().bool()[None, None]
            output = block.self_attn(hidden_states=batch.hidden, **named)[0]
            found.append(gather(batch.hidden, output, named, each))
        return block.self_attn, found


def test_tokens_are_drawn_once_each_of_their_class() -> None:
    _, batches = batches_of()
    found = tokens_of(draw(batches, per_class=30, kinds=KINDS, seed=[0, 1]))
    assert len({place[:3] for place in found}) == len(found)
    for batch, sequence, place, _, kind in found:
        assert int(batches[batch].classes[sequence, place]) == kind
    for kind in KINDS:
        assert sorted(each[3] for each in found if each[4] == kind) == list(range(30))


def test_a_class_with_fewer_tokens_gives_all_of_them() -> None:
    _, batches = batches_of(2)
    wanted = sum(int(torch.isin(b.classes, torch.tensor(KINDS)).sum()) for b in batches)
    assert len(tokens_of(draw(batches, per_class=10**6, kinds=KINDS, seed=[0]))) == wanted


def test_a_draw_may_be_from_few_sequences() -> None:
    _, batches = batches_of(8)
    for most, count in ((1, 1), (150, 2), (10**6, 8)):
        found = tokens_of(draw(batches, per_class=10**6, kinds=KINDS, seed=[0], most_tokens=most))
        assert len({each[:2] for each in found}) == count


@torch.no_grad()
def test_a_smaller_draw_is_the_beginning_of_a_larger_one() -> None:
    _, batches = batches_of()
    drawn = draw(batches, per_class=20, kinds=KINDS, seed=[2])
    rows = [gather(b.hidden, b.hidden, {}, d) for b, d in zip(batches, drawn, strict=True) if d]
    (every,) = joined(rows)
    some = every.upto(7)
    assert sorted(some.ranks.tolist()) == sorted([*range(7)] * 2)
    assert torch.equal(every.rows[every.ranks < 7], some.rows)
    assert not bool((some.classes == PAD).any())


@torch.no_grad()
def test_rows_that_stand_alone_give_what_they_give_among_others() -> None:
    stream, batches = batches_of()
    with stream.block(0) as block:
        for batch, drawn in zip(
            batches, draw(batches, per_class=9, kinds=KINDS, seed=[3]), strict=True
        ):
            if drawn is not None:
                found = gather(batch.hidden, block.mlp(batch.hidden), {}, drawn)
                torch.testing.assert_close(run(block.mlp, {}, found), found.output)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [5, NEVER])
def test_attention_of_drawn_tokens_looks_back_at_all(masked: bool, size: int) -> None:
    attention, parts = attention_excerpts(masked=masked)
    together = joined(parts)
    assert len(together) == (len(parts) if masked else 1)
    for excerpt in (each.upto(size) for each in [*parts, *together]):
        real = excerpt.classes != PAD
        found: Tensor = run(attention, {}, excerpt)
        torch.testing.assert_close(
            found[real],
            excerpt.output[real],
            rtol=ROUNDINGS,
            atol=ROUNDINGS * float(found.abs().max()),
        )


@torch.no_grad()
def test_other_weights_of_attention_are_used_and_put_back() -> None:
    attention, parts = attention_excerpts()
    (excerpt,) = joined(parts)
    real = excerpt.classes != PAD
    for name in ("q_proj", "k_proj", "v_proj"):
        before = attention.get_parameter(f"{name}.weight").clone()
        found = run(attention, {f"{name}.weight": 40 * before}, excerpt)
        assert float((found - excerpt.output)[real].abs().max()) > 1e-3
        assert torch.equal(attention.get_parameter(f"{name}.weight"), before)
