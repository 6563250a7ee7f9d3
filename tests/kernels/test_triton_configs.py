"""The rule of blocks has a legal answer for every shape, and arguments that do not fit are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mbq_export.errors import FormatError, InternalError, UsageError
from mbq_export.schemes.base import CHANNEL
from mbq_kernels.configs import Gemm, Gemv, main_configs, select_config
from mbq_kernels.testing import Case
from mbq_kernels.weights import device_weight

pytest.importorskip("triton")

from mbq_kernels.base import SCHEMES_WITH_KERNELS, checked_output, kernel_for

CAPABILITIES = (0, 80, 86, 87, 89, 90, 100, 110, 120, 121)
REAL_SIZES = (896, 3584, 4096, 4864, 8192, 11008, 18944, 29568)


def power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@given(
    op=st.sampled_from(["weight_only", "int8"]),
    sm=st.sampled_from(CAPABILITIES),
    n=st.integers(1, 200_000),
    k=st.integers(1, 40_000),
    m=st.integers(1, 5000),
)
def test_every_shape_gets_blocks_that_cover_it(op: str, sm: int, n: int, k: int, m: int) -> None:
    config = select_config(op, sm=sm, n=n, k=k, m=m)
    along_n, along_m = config.grid(n=n, m=m)
    assert along_n * 16 * config.n_tiles >= n > (along_n - 1) * 16 * config.n_tiles
    assert along_m * config.rows >= m > (along_m - 1) * config.rows
    assert all(power_of_two(constant) for constant in config.constants.values())
    assert power_of_two(config.num_warps)
    if isinstance(config, Gemm):
        assert config.rows >= 16, "a dot has at least 16 rows"
        assert config.n_tiles >= 2, "and 16 columns, which are half of the rows of W"


@pytest.mark.parametrize("sm", [80, 87, 89, 90, 120])
@pytest.mark.parametrize("op", ["weight_only", "int8"])
def test_what_real_layers_get_is_what_gets_compiled(op: str, sm: int) -> None:
    compiled = main_configs(op, sm=sm)
    for n in REAL_SIZES:
        for k in (size for size in REAL_SIZES if size > 1000):
            for m in (1, 2, 3, 7, 8, 9, 17, 100, 4096):
                assert select_config(op, sm=sm, n=n, k=k, m=m) in compiled


def test_a_program_of_few_rows_refuses_more() -> None:
    with pytest.raises(InternalError, match="9 rows of activations for a kernel of 8"):
        Gemv(n_tiles=1, k_tiles=1, rows=8, num_warps=4).grid(n=16, m=9)


@pytest.mark.parametrize("scheme", SCHEMES_WITH_KERNELS)
def test_a_kernel_is_found_by_the_name_of_its_scheme(scheme: str) -> None:
    assert kernel_for(scheme).name == scheme


def test_an_unknown_scheme_is_refused_with_those_that_exist() -> None:
    with pytest.raises(UsageError, match="w2a16") as caught:
        kernel_for("w2a16")
    assert caught.value.code == "E2001"
    assert "w3a16, w4a16, w4a8" in str(caught.value)


@pytest.mark.parametrize(
    ("x", "out"),
    [
        (torch.zeros(2, 120, dtype=torch.float16), None),
        (torch.zeros(128, dtype=torch.float16), None),
        (torch.zeros(2, 128), None),
        (torch.zeros(128, 2, dtype=torch.float16).T, None),
        (torch.zeros(2, 128, dtype=torch.bfloat16), None),
        (torch.zeros(2, 128, dtype=torch.float16), torch.zeros(2, 17, dtype=torch.float16)),
        (torch.zeros(2, 128, dtype=torch.float16), torch.zeros(2, 16)),
        (torch.zeros(2, 128, dtype=torch.float16), torch.zeros(16, 2, dtype=torch.float16).T),
    ],
    ids=["k", "one axis", "float32", "strides", "bias", "out shape", "out dtype", "out strides"],
)
def test_tensors_that_do_not_fit_the_weight_are_refused(
    x: torch.Tensor, out: torch.Tensor | None
) -> None:
    case = Case(scheme="w4a8", dtype=torch.float16, m=2, n=16, k=128, group_size=CHANNEL, bias=True)
    weight = device_weight(case.make(0).tiled, dtype=torch.float16)
    with pytest.raises(FormatError) as caught:
        checked_output(x, weight, out)
    assert caught.value.code == "E4102"


def test_a_weight_keeps_its_bytes_on_the_way_to_a_device() -> None:
    tiled = Case(
        scheme="w3a16", dtype=torch.bfloat16, m=1, n=40, k=256, group_size=64, bias=True
    ).make(0).tiled  # fmt: skip
    weight = device_weight(tiled, dtype=torch.bfloat16).to("cpu")
    assert weight.codes.numpy().tobytes() == tiled.codes.tobytes()
    assert weight.scales.numpy().tobytes() == tiled.scales.tobytes()
    assert weight.zeros.numpy().tobytes() == tiled.zeros.tobytes()
    assert weight.bias.float().tolist() == tiled.bias.tolist()
    assert weight.nbytes == tiled.nbytes
