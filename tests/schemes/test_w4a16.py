"""The scheme from a real weight to a product: rounding, packing, and the oracle agree."""

import numpy as np
import pytest
import torch

from mbq_export.schemes.affine import dequantize, quantize
from mbq_export.schemes.base import PackedWeight, check_packed
from mbq_export.schemes.layouts.dense import pack
from mbq_export.schemes.w4a16 import SCHEME


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_a_rounded_weight_multiplies_as_its_codes_say(group_size: int) -> None:
    generator = torch.Generator().manual_seed(group_size)
    weight = torch.randn(16, 256, generator=generator)
    codes = quantize(weight, scheme=SCHEME, group_size=group_size)
    packed = PackedWeight(
        words=pack(codes.codes.numpy(), bits=SCHEME.weight_bits),
        scales=codes.scales.numpy(),
        zeros=codes.zeros.numpy(),
        k=256,
        bits=SCHEME.weight_bits,
        group_size=group_size,
    )
    check_packed(packed)
    x = torch.randn(4, 256, generator=generator).double().numpy()
    expected = x @ dequantize(codes).double().numpy().T
    np.testing.assert_allclose(SCHEME.linear_reference(x, packed), expected, rtol=1e-12)
