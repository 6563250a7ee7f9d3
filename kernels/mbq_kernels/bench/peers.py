"""What others offer for the same linear, each through its own public functions. None is a dependency.

A peer is an adapter of four parts: is it here, pack random weights, multiply, and how far its answer may be from the
weights it was given. One that is missing or refuses is listed with its reason. What each one brackets:

    torch int4        4-bit groups of 128, bf16: the same job with one more bit
    torch int8        integer products alone, weights twice as large: the ceiling of int8 prefill
    gemlite           4 and 2 bits in Triton: 3 bits lie between
    bitsandbytes      4-bit table codes, groups of 64
    torchao           its front end to torch's 4-bit product: what the front end costs
    hqq               3 bits, dequantized by torch before every product: the naive way
"""

import copy
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own usage)

from mbq_export.errors import UsageError
from mbq_kernels.bench.entrant import ANY_ROWS, Entrant, Placed, Placing, Setting
from mbq_kernels.bench.gate import float_gate, quantized_rows
from mbq_kernels.bench.linears import float_copies, library_tolerance, row_blocks
from mbq_kernels.bench.shapes import Shape
from mbq_kernels.comparison import Tolerance

GROUP: Final = 128
NF4_BLOCK: Final = 64
INT4_MIDDLE: Final = 8
INNER_TILES: Final = 8
"""Tiles of 16 columns that torch's 4-bit layout keeps together; 8 is what its own front end uses."""
INT_MM_ROWS: Final = 17
"""Fewest rows that torch's int8 product takes."""
FUSED_ZERO_L2: Final = 5e-3
"""gemlite keeps z * s rounded to fp16: half an ulp of a product that is larger than the weight."""
BF16_WEIGHT_L2: Final = 8e-3
"""Weights (q - 8) * s + z are rounded to bf16 twice."""
NEAREST_INT4_L2: Final = 0.2
"""Against the weights before they were quantized: rounding normal weights to 4 bits leaves about 0.1."""
NEAREST_INT8_L2: Final = 0.05
"""8-bit activations leave about 0.01 as integers, about 0.03 as floats."""


def only_norm(relative_l2: float) -> Tolerance:
    """A bound on the norm of the error alone."""
    return Tolerance(relative_l2=relative_l2, relative=1.0, per_slack=float("inf"))


def here(module: str, *, gpu: bool = True) -> Callable[[Setting], str]:
    """Say why a package cannot take part: not installed, or no GPU."""

    def absent(setting: Setting) -> str:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        return "there is no GPU" if gpu and not setting.on_gpu else ""

    return absent


def _torch_int4(shape: Shape, placing: Placing) -> Placed:
    device, groups = placing.setting.device, shape.k // GROUP
    codes = torch.randint(0, 16, (shape.n, shape.k), dtype=torch.uint8, device=device)
    scales = torch.rand(groups, shape.n, 2, device=device).bfloat16() / shape.k**0.5
    packed = torch.ops.aten._convert_weight_to_int4pack(  # noqa: SLF001 (has no other name)
        codes[:, ::2] << 4 | codes[:, 1::2], INNER_TILES
    )
    wide = scales.float().transpose(0, 1).repeat_interleave(GROUP, dim=1)
    dense = (codes.float() - INT4_MIDDLE) * wide[..., 0] + wide[..., 1]
    copies = [(packed.clone(), scales.clone()) for _ in range(placing.copies)]
    return Placed(
        weight_bytes=packed.nbytes + scales.nbytes,
        run=lambda copy, x: torch.ops.aten._weight_int4pack_mm(  # noqa: SLF001
            x, copies[copy][0], GROUP, copies[copy][1]
        ),
        wrong=float_gate(lambda: row_blocks(dense), only_norm(BF16_WEIGHT_L2)),
    )


def _torch_int8(shape: Shape, placing: Placing) -> Placed:
    size = (shape.n, shape.k)
    first = torch.randint(-127, 128, size, dtype=torch.int8, device=placing.setting.device)
    copies = [first, *(first.clone() for _ in range(placing.copies - 1))]
    rounded: dict[int, Tensor] = {}

    def codes_of(x: Tensor) -> Tensor:
        """Rounded outside the timing: this peer is the product alone."""
        if len(x) not in rounded:
            rounded[len(x)] = quantized_rows(x)[0].to(torch.int8)
        return rounded[len(x)]

    def wrong(y: Tensor, x: Tensor) -> str:
        exact = torch.cat([codes_of(x).double() @ block.T for block in row_blocks(first)], dim=1)
        differ = int((y.double() != exact).sum())
        return f"{differ} of {y.numel()} sums differ" if differ else ""

    return Placed(
        weight_bytes=first.nbytes,
        run=lambda copy, x: torch._int_mm(codes_of(x), copies[copy].T),  # noqa: SLF001
        wrong=wrong,
    )


def _gemlite(bits: int, form: str) -> Callable[[Shape, Placing], Placed]:
    """Weights (u - z) * s through one of gemlite's helper classes."""

    def place(shape: Shape, placing: Placing) -> Placed:
        helper = importlib.import_module("gemlite.helper")
        device, groups = placing.setting.device, shape.k // GROUP
        codes = torch.randint(0, 2**bits, (shape.n, shape.k), dtype=torch.uint8, device=device)
        scales = (torch.rand(shape.n, groups, device=device) + 0.5).half() / shape.k**0.5
        zeros = torch.randint(0, 2**bits, (shape.n, groups), device=device).half()
        maker = getattr(helper, form)(device=str(device), dtype=torch.float16)
        layers = [
            maker.from_weights(codes.clone(), scales.clone(), zeros.clone(), bias=None)
            for _ in range(placing.copies)
        ]
        wide = [part.float().repeat_interleave(GROUP, dim=1) for part in (scales, zeros)]
        dense = (codes.float() - wide[1]) * wide[0]
        bound = NEAREST_INT8_L2 if form.startswith("A8") else FUSED_ZERO_L2
        return Placed(
            weight_bytes=shape.weights * bits // 8 + scales.nbytes + zeros.nbytes,
            run=lambda copy, x: layers[copy](x),
            wrong=float_gate(lambda: row_blocks(dense), only_norm(bound)),
        )

    return place


def _bitsandbytes(shape: Shape, placing: Placing) -> Placed:
    library = importlib.import_module("bitsandbytes")
    quantize, dequantize = library.functional.quantize_4bit, library.functional.dequantize_4bit
    weight = float_copies(shape, 1, dtype="float16", device=placing.setting.device)[0]
    copies = [
        quantize(weight, blocksize=NF4_BLOCK, quant_type="nf4") for _ in range(placing.copies)
    ]
    packed, state = copies[0]
    return Placed(
        weight_bytes=packed.nbytes + state.absmax.nbytes,
        run=lambda copy, x: library.matmul_4bit(
            x, copies[copy][0].t(), quant_state=copies[copy][1]
        ),
        wrong=float_gate(
            lambda: row_blocks(dequantize(packed, state)), library_tolerance("float16")
        ),
    )


def _torchao(shape: Shape, placing: Placing) -> Placed:
    library = importlib.import_module("torchao.quantization")
    config = library.Int4WeightOnlyConfig(
        group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )
    weights = float_copies(shape, 1, dtype="bfloat16", device=placing.setting.device)
    layers = []
    for _ in range(placing.copies):
        layer = torch.nn.Linear(shape.k, shape.n, bias=False, device="meta", dtype=torch.bfloat16)
        layer.weight = torch.nn.Parameter(weights[0], requires_grad=False)
        library.quantize_(layer, config)
        layers.append(layer)
    return Placed(
        weight_bytes=shape.weights // 2 + 4 * shape.weights // GROUP,
        run=lambda copy, x: F.linear(x, layers[copy].weight),
        wrong=float_gate(lambda: row_blocks(weights[0]), only_norm(NEAREST_INT4_L2)),
    )


def _hqq(shape: Shape, placing: Placing) -> Placed:
    library = importlib.import_module("hqq.core.quantize")
    config = library.BaseQuantizeConfig(nbits=3, group_size=GROUP, axis=1)
    weight = float_copies(shape, 1, dtype="float16", device=placing.setting.device)[0]
    plain = torch.nn.Linear(shape.k, shape.n, bias=False, device="meta", dtype=torch.float16)
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    device = str(placing.setting.device)
    first = library.HQQLinear(plain, config, compute_dtype=torch.float16, device=device)
    # Copied, for its search for scales takes longer than everything else together.
    layers = [first, *(copy.deepcopy(first) for _ in range(placing.copies - 1))]
    return Placed(
        weight_bytes=layers[0].W_q.nbytes + 4 * shape.weights // GROUP,
        run=lambda place, x: torch.matmul(x, layers[place].dequantize().t()),
        wrong=float_gate(lambda: row_blocks(layers[0].dequantize()), library_tolerance("float16")),
    )


_TINY: Final = Entrant(
    name="torch int4",
    source="peer",
    scheme="int4",
    dtype="bfloat16",
    group_size=GROUP,
    bits=4.25,
    int8=False,
    absent=here("torch"),
    place=_torch_int4,
)
_HALF: Final = replace(_TINY, dtype="float16")
_GEMLITE: Final = replace(_HALF, absent=here("gemlite"))

PEERS: Final = {
    "torch": (
        _TINY,
        replace(
            _HALF,
            name="torch int8 product",
            scheme="int8",
            group_size=0,
            bits=8.0,
            int8=True,
            place=_torch_int8,
            rows=(INT_MM_ROWS, ANY_ROWS),
        ),
    ),
    "gemlite": (
        replace(_GEMLITE, name="gemlite A16W4", bits=4.25, place=_gemlite(4, "A16W4_HQQ_INT")),
        replace(
            _GEMLITE,
            name="gemlite A16W2",
            scheme="int2",
            bits=2.25,
            place=_gemlite(2, "A16W2_HQQ_INT"),
        ),
        replace(
            _GEMLITE,
            name="gemlite A8W4",
            scheme="int4 x 8 bit",
            int8=True,
            bits=4.25,
            place=_gemlite(4, "A8W4_HQQ_INT_dynamic"),
        ),
    ),
    "bitsandbytes": (
        replace(
            _HALF,
            name="bitsandbytes NF4",
            scheme="nf4",
            group_size=NF4_BLOCK,
            bits=4.5,
            absent=here("bitsandbytes"),
            place=_bitsandbytes,
        ),
    ),
    "torchao": (replace(_TINY, name="torchao int4", absent=here("torchao"), place=_torchao),),
    "hqq": (
        replace(_HALF, name="hqq 3 bits", scheme="int3", bits=3.45, absent=here("hqq"), place=_hqq),
    ),
}
"""Packages and what is timed of each."""


def peers_of(text: str) -> tuple[Entrant, ...]:
    """Read ``auto`` (all), ``none``, or a list of packages.

    Raises:
        UsageError: E2001 for a package without an adapter.
    """
    if text in {"auto", "none"}:
        names = list(PEERS) if text == "auto" else []
    else:
        names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise UsageError(
            "E2001",
            f"There is no adapter for {unknown[0]!r}.",
            why=f"known: {', '.join(PEERS)}",
            fix="--peers auto",
        )
    return tuple(entrant for name in dict.fromkeys(names) for entrant in PEERS[name])
