"""What a linear reads is what a whole run of the block shows it, and no more of the block is run."""

import pytest
import torch
from torch import Tensor

from mbq_export.blocks.reading import rows_read_by
from mbq_export.blocks.stream import BlockStream
from mbq_export.families.base import LINEARS
from tests.questions import questions, tiny_model


@pytest.mark.parametrize("linear", LINEARS)
def test_rows_are_those_of_a_whole_run(linear: str) -> None:
    model = tiny_model()
    stream = BlockStream(model)
    pairs = [(batch, batch.hidden) for batch in stream.begin(questions(model, 5))]
    seen: list[Tensor] = []
    with stream.block(1) as block:
        found = list(rows_read_by(linear, stream=stream, block=block, index=1, batches=pairs))
        module = block.get_submodule(linear)
        module.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        stream.run_all(block, 1, pairs)
    assert len(found) == len(pairs)
    for rows, wanted in zip(found, seen, strict=True):
        assert torch.equal(rows, wanted)


def test_nothing_behind_the_linear_is_run() -> None:
    model = tiny_model()
    stream = BlockStream(model)
    pairs = [(batch, batch.hidden) for batch in stream.begin(questions(model, 2))]
    ran: list[str] = []
    with stream.block(0) as block:
        for name in LINEARS:
            block.get_submodule(name).register_forward_hook(
                lambda _module, _args, _output, name=name: ran.append(name)
            )
        list(rows_read_by(LINEARS[3], stream=stream, block=block, index=0, batches=pairs[:1]))
        assert ran == list(LINEARS[:3])
        ran.clear()
        stream.run_all(block, 0, pairs[:1])
    assert ran == list(LINEARS), "the block runs whole again afterwards"


def test_rows_are_seen_before_other_hooks_change_them() -> None:
    model = tiny_model()
    stream = BlockStream(model)
    pairs = [(batch, batch.hidden) for batch in stream.begin(questions(model, 1))]
    with stream.block(0) as block:
        plain = list(rows_read_by(LINEARS[0], stream=stream, block=block, index=0, batches=pairs))
        module = block.get_submodule(LINEARS[0])
        module.register_forward_pre_hook(lambda _module, args: (args[0] * 2,))
        again = list(rows_read_by(LINEARS[0], stream=stream, block=block, index=0, batches=pairs))
    assert torch.equal(plain[0], again[0])
