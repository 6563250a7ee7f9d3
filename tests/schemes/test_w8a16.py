"""Weights of 8 bits and activations as they are: the oracle says what the codes say."""

import numpy as np
import torch

from mbq_export.schemes.affine import dequantize, quantize
from mbq_export.schemes.base import CHANNEL
from mbq_export.schemes.w8a8 import SCHEME as W8A8
from mbq_export.schemes.w8a16 import SCHEME
from tests.schemes.integer_weights import packed_of

ROUNDED = 2.0**-24
"""A product of code and scale in float32."""


def test_a_rounded_weight_multiplies_as_its_codes_say() -> None:
    """An odd number of rows, columns that end inside no word, one row of zeros, one outlier."""
    weight = torch.randn(13, 40, generator=torch.Generator().manual_seed(0))
    weight[3], weight[5, 7] = 0, 1e4
    codes = quantize(weight, scheme=SCHEME, group_size=CHANNEL)
    packed = packed_of(codes, bits=8)
    one_hot = SCHEME.linear_reference(np.eye(40), packed)
    np.testing.assert_allclose(one_hot, dequantize(codes).numpy().T, rtol=ROUNDED)
    x = np.random.default_rng(0).standard_normal((3, 40))
    np.testing.assert_allclose(SCHEME.linear_reference(x, packed), x @ one_hot, rtol=1e-12)


def test_its_weights_are_those_of_w8a8() -> None:
    """Only what happens to activations differs."""
    weight = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    found, other = (quantize(weight, scheme=each, group_size=CHANNEL) for each in (SCHEME, W8A8))
    assert torch.equal(found.codes, other.codes)
    assert torch.equal(found.scales, other.scales)
    assert (SCHEME.rounds_activations, W8A8.rounds_activations) == (False, True)
