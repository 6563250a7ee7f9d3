"""Attention of one token in Triton's interpreter; run by test_decode_attention.py in a process of its own.

float16 alone: the interpreter's products of bfloat16 are wrong.
"""

import pytest
import torch

from mbq_kernels import decode_attention
from mbq_kernels.decoder import random_decoder
from mbq_kernels.decoder_weights import DecoderShape
from tests.kernels.attention_by_hand import RELATIVE, drawn, relative

SMALL, LARGE, MANY = (4, 2, 32), (28, 4, 128), (34, 2, 16)
CASES = [
    *((SMALL, 4, position) for position in (0, 1, 63, 64, 130, 255)),
    (LARGE, decode_attention.PIECES, 130),
    (MANY, 2, 255),
]
"""(Heads, pieces, position): both sides of a block of slots, pieces of several blocks and of none, and more query
heads to a key head than one product has rows. The interpreter is slow: few pieces where they are not the point."""


@pytest.fixture
def few_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_attention, "PIECES", 4)


@pytest.mark.parametrize(("heads", "pieces", "position"), CASES, ids=str)
def test_a_token_sees_what_is_not_after_it(
    heads: tuple[int, int, int], pieces: int, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_attention, "PIECES", pieces)
    step = drawn(heads, position, dtype=torch.float16)
    found = decode_attention.attend(*step.arguments)
    assert relative(found, step.answer) <= RELATIVE[torch.float16]
    assert torch.equal(step.keys[:, position], step.new_key)
    assert torch.equal(step.values[:, position], step.new_value)


@pytest.mark.usefixtures("few_pieces")
def test_a_decoder_steps_with_the_kernels_as_without() -> None:
    shape = DecoderShape(
        layers=2, hidden=128, heads=4, kv_heads=2, head_dim=32, intermediate=256, vocab=100
    )
    plain, fast = (random_decoder(shape, "w3a16", slots=128) for _ in range(2))
    fast._step_attention = decode_attention.attend
    embeds = plain.embed(torch.arange(60, 71))
    for decoder in (plain, fast):
        decoder.prefill(embeds[:8])
    for row in embeds[8:]:
        theirs, ours = (decoder.decode_step(row[None]) for decoder in (plain, fast))
        assert relative(ours, theirs) <= 10 * RELATIVE[torch.float16], "roundings of two blocks"
