"""The decoder is Qwen2 as transformers computes it, whatever its linears are and however it is called."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from mbq_export.errors import UsageError
from mbq_export.schemes import SCHEMES
from mbq_kernels import decoder_weights, ops
from mbq_kernels.decoder import (
    SLOT_STEP,
    Decoder,
    DecoderShape,
    generate,
    random_decoder,
)
from mbq_kernels.decoder_weights import (
    LLAVA_OV_7B,
    BlockWeights,
    DecoderWeights,
    DenseWeight,
    random_weights,
)
from mbq_kernels.weights import DeviceWeight

SHAPE = DecoderShape(
    layers=2, hidden=128, heads=4, kv_heads=2, head_dim=32, intermediate=256, vocab=100
)
SCHEMES_OF_BLOCKS = ("fp16", "w3a16", "w4a16", "w4a8")
FLOAT32_RELATIVE = 1e-5
"""Two orders of summation in float32 through two blocks."""
HALF_RELATIVE = {torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Some twenty roundings of activations along two blocks, half an ulp each."""
INT8_RELATIVE = 0.05
"""Beyond that, activations of w4a8 that round to another integer."""


@pytest.fixture(scope="module")
def qwen() -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=SHAPE.vocab,
        hidden_size=SHAPE.hidden,
        intermediate_size=SHAPE.intermediate,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        rms_norm_eps=SHAPE.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": SHAPE.rope_theta},
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).eval().requires_grad_(requires_grad=False)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def dense(linear: torch.nn.Linear) -> DenseWeight:
    return DenseWeight(weight=linear.weight, bias=linear.bias)


def weights_of(model: Qwen2ForCausalLM, *, joined: bool) -> DecoderWeights:
    def together(*parts: torch.nn.Linear) -> tuple[DenseWeight, ...]:
        if not joined:
            return tuple(map(dense, parts))
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        return (DenseWeight(weight=torch.cat([part.weight for part in parts]), bias=bias),)

    return DecoderWeights(
        embed=model.model.embed_tokens.weight,
        blocks=tuple(
            BlockWeights(
                input_norm=layer.input_layernorm.weight,
                qkv=together(
                    layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
                ),
                o=dense(layer.self_attn.o_proj),
                post_norm=layer.post_attention_layernorm.weight,
                gate_up=together(layer.mlp.gate_proj, layer.mlp.up_proj),
                down=dense(layer.mlp.down_proj),
            )
            for layer in model.model.layers
        ),
        final_norm=model.model.norm.weight,
        head=dense(model.lm_head),
    )


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(SHAPE.vocab, (count,), generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def pieces(decoder: Decoder, embeds: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """Logits after each piece; pieces of one token are decode steps."""
    found, start = [], 0
    for size in sizes:
        part = embeds[start : start + size]
        step = decoder.decode_step if size == 1 else decoder.prefill
        found.append(step(part).clone())
        start += size
    return found


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("sizes", [(20,), (7, 1, 1, 1, 10), (1,) * 20, (1, 19)])
def test_it_is_qwen2_however_its_input_is_cut(
    qwen: Qwen2ForCausalLM, sizes: tuple[int, ...], joined: bool
) -> None:
    decoder = Decoder(SHAPE, weights_of(qwen, joined=joined), slots=20)
    ids = tokens(20)
    wanted = qwen(ids[None]).logits[0]
    ends = torch.tensor(sizes).cumsum(0) - 1
    found = torch.stack(pieces(decoder, decoder.embed(ids), sizes))
    assert relative(found, wanted[ends]) <= FLOAT32_RELATIVE
    assert decoder.length == 20


def test_greedy_tokens_are_those_of_transformers(qwen: Qwen2ForCausalLM) -> None:
    decoder = Decoder(SHAPE, weights_of(qwen, joined=True), slots=64)
    for seed in range(4):
        ids = tokens(9, seed)
        wanted = qwen.generate(ids[None], max_new_tokens=12, do_sample=False)[0, 9:].tolist()
        assert generate(decoder, decoder.embed(ids), new_tokens=12) == wanted
        end = wanted[3]
        stopped = generate(decoder, decoder.embed(ids), new_tokens=12, ends={end})
        assert stopped == wanted[: wanted.index(end) + 1]


def test_an_earlier_sequence_leaves_no_trace(qwen: Qwen2ForCausalLM) -> None:
    fresh = Decoder(SHAPE, weights_of(qwen, joined=True), slots=64)
    used = Decoder(SHAPE, weights_of(qwen, joined=True), slots=64)
    used.pretend(50)
    used.decode_step()
    used.reset()
    embeds = fresh.embed(tokens(12))
    for one, other in zip(
        pieces(fresh, embeds, (8, 1, 3)), pieces(used, embeds, (8, 1, 3)), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", HALF_RELATIVE, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES_OF_BLOCKS)
def test_random_weights_decode_as_their_plain_values_do(scheme: str, dtype: torch.dtype) -> None:
    """Every scheme, fused and with its epilogues, against matrices that hold the same weights."""
    decoder = random_decoder(SHAPE, scheme, slots=32, dtype=dtype, head="w4a16")
    plain = Decoder(SHAPE, unpacked(decoder.weights), slots=32)
    embeds = decoder.embed(tokens(12))
    ours, theirs = (
        torch.stack(pieces(each, embeds.to(each.dtype), (9, 1, 2))) for each in (decoder, plain)
    )
    allowed = HALF_RELATIVE[dtype] + (INT8_RELATIVE if scheme == "w4a8" else 0)
    assert relative(ours, theirs) <= allowed
    assert ours.float().std() > 0.1, "random weights let the signal die"


def unpacked(weights: DecoderWeights) -> DecoderWeights:
    """The same numbers in float32 matrices, gate and up apart."""

    def matrix(linear: decoder_weights.Linear) -> DenseWeight:
        if isinstance(linear, DenseWeight):
            bias = None if linear.bias is None else linear.bias.float()
            return DenseWeight(weight=linear.weight.float(), bias=bias)
        bias = None if linear.bias is None else linear.bias.float()
        # Weight-only, whatever the scheme does with activations: columns of W are answers to one-hot rows.
        bare = replace(linear, bias=None)
        return DenseWeight(weight=ops.apply(bare, torch.eye(linear.k)).T.contiguous(), bias=bias)

    def halves(linears: tuple[decoder_weights.Linear, ...]) -> tuple[DenseWeight, ...]:
        whole = matrix(linears[0])
        if isinstance(linears[0], DenseWeight):
            return (whole,)
        gate, up = whole.weight.view(-1, 2, 16, whole.weight.shape[1]).unbind(1)
        return tuple(DenseWeight(weight=part.reshape(-1, part.shape[-1])) for part in (gate, up))

    return DecoderWeights(
        embed=weights.embed.float(),
        blocks=tuple(
            BlockWeights(
                input_norm=block.input_norm.float(),
                qkv=tuple(map(matrix, block.qkv)),
                o=matrix(block.o),
                post_norm=block.post_norm.float(),
                gate_up=halves(block.gate_up),
                down=matrix(block.down),
            )
            for block in weights.blocks
        ),
        final_norm=weights.final_norm.float(),
        head=matrix(weights.head),
    )


@pytest.mark.parametrize("scheme", SCHEMES_OF_BLOCKS)
def test_random_weights_come_from_their_seed(scheme: str) -> None:
    first, again, other = (
        random_weights(SHAPE, scheme, device="cpu", dtype=torch.float16, seed=seed)
        for seed in (1, 1, 2)
    )

    def bits(weights: DecoderWeights) -> Tensor:
        down = weights.blocks[1].down
        return down.codes if isinstance(down, DeviceWeight) else down.weight

    assert torch.equal(bits(first), bits(again))
    assert not torch.equal(bits(first), bits(other))


def test_bytes_of_a_token_are_those_of_its_weights() -> None:
    def count(scheme: str) -> int:
        return random_weights(SHAPE, scheme, device="cpu", dtype=torch.float16).nbytes

    head, linears = 100 * 128, 2 * (128 * 256 + 128 * 128 + 3 * 128 * 256)
    assert count("fp16") == 2 * (head + linears)
    per_weight = SCHEMES["w3a16"].bits_per_weight(128) / 8
    assert count("w3a16") == 2 * head + linears * per_weight


def test_sizes_of_the_7b_decoder_are_those_of_its_layers() -> None:
    assert LLAVA_OV_7B.qkv_rows == 4608
    assert LLAVA_OV_7B.kv_bytes_per_token(torch.float16) == 57_344


ASKED: dict[str, Callable[[Decoder], object]] = {
    "prefill": lambda decoder: decoder.prefill(torch.zeros(1, SHAPE.hidden)),
    "decode step": lambda decoder: decoder.decode_step(),
    "pretend": lambda decoder: decoder.pretend(SLOT_STEP + 1),
}


@pytest.mark.parametrize("what", ASKED)
def test_a_full_cache_is_an_error_with_a_code(what: str) -> None:
    decoder = random_decoder(SHAPE, "fp16", slots=5, dtype=torch.float32)
    assert decoder.slots == SLOT_STEP
    decoder.pretend(SLOT_STEP)
    with pytest.raises(UsageError) as caught:
        ASKED[what](decoder)
    assert caught.value.code == "E2009"


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES_OF_BLOCKS)
def test_a_gpu_decodes_by_graph_what_it_prefills_in_one_call(scheme: str) -> None:
    decoder = random_decoder(SHAPE, scheme, slots=64, device="cuda")
    assert decoder._step_attention is not None, "Triton is not installed"
    embeds = decoder.embed(tokens(20).cuda())
    whole = decoder.prefill(embeds).clone()
    decoder.reset()
    stepped = pieces(decoder, embeds, (10, *(1,) * 10))[-1]
    assert relative(stepped, whole) <= HALF_RELATIVE[torch.float16] + (
        INT8_RELATIVE if scheme == "w4a8" else 0
    )


@pytest.mark.gpu
def test_a_gpu_decodes_in_float32_as_the_cpu_does(qwen: Qwen2ForCausalLM) -> None:
    ids = tokens(9)
    wanted = qwen.generate(ids[None], max_new_tokens=12, do_sample=False)[0, 9:].tolist()
    moved = weights_of(qwen.to("cuda"), joined=True)
    try:
        decoder = Decoder(SHAPE, moved, slots=64)
        for _ in range(2):  # the second time the graph is there already
            assert generate(decoder, decoder.embed(ids.cuda()), new_tokens=12) == wanted
    finally:
        qwen.to("cpu")


@pytest.mark.gpu
def test_a_replay_gives_the_same_bits_every_time() -> None:
    decoder = random_decoder(SHAPE, "w3a16", slots=128, device="cuda")
    found = []
    for _ in range(3):
        decoder.pretend(100)
        found.append(decoder.decode_step(torch.ones(1, SHAPE.hidden).cuda().half()).clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
