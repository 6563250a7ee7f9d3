"""Two halves after each other are the block."""

import torch

from mbq_export.blocks.halves import KINDS, Half
from mbq_export.blocks.stream import BlockStream
from tests.questions import questions, tiny_model


def test_two_halves_after_each_other_are_the_block() -> None:
    model = tiny_model()
    stream = BlockStream(model)
    batches = [(batch, batch.hidden) for batch in stream.begin(questions(model, 4))]
    for index in range(len(stream)):
        with stream.block(index) as block:
            wanted = stream.run_all(block, index, batches)
            rows = batches
            for kind in KINDS:
                half = Half(index=index, kind=kind, block=block, smooth=model.family.smooth)
                found = list(half.run(stream, rows))
                rows = [(batch, moved) for (batch, _), moved in zip(batches, found, strict=True)]
        for (_, moved), output in zip(rows, wanted, strict=True):
            assert torch.equal(moved, output)
        batches = rows


def test_halves_share_the_linears_of_a_block() -> None:
    model = tiny_model()
    with BlockStream(model).block(0) as block:
        halves = [Half(index=0, kind=k, block=block, smooth=model.family.smooth) for k in KINDS]
    assert (*halves[0].units, *halves[1].units) == model.family.linears
    assert halves[1].units == {
        "mlp.gate_proj": "gate_up",
        "mlp.up_proj": "gate_up",
        "mlp.down_proj": "down",
    }
