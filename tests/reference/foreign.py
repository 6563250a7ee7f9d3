"""Foreign files of quantized linears, written one element at a time from the formats' descriptions.

Nothing here is fast or shared with the package: numbers are Python integers, words are sums of powers of two.
A linear is a list of rows (N, K) of codes, zero points are (N, G).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WORD = 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Output row, of the eight in a word, that nibble i holds."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Random codes of one linear."""

    codes: NDArray[np.uint8]  # (N, K)
    zeros: NDArray[np.uint8]  # (N, G)
    scales: NDArray[np.float16]  # (N, G)
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.codes.shape[0]), int(self.codes.shape[1])


def random_linear(rng: np.random.Generator, n: int, k: int, *, bits: int, group: int) -> Linear:
    groups = k // group
    return Linear(
        codes=rng.integers(0, 2**bits, (n, k), dtype=np.uint8),
        zeros=rng.integers(0, 2**bits, (n, groups), dtype=np.uint8),
        scales=(2.0 ** rng.uniform(-13, 2, (n, groups))).astype(np.float16),
        bits=bits,
    )


def as_int32(words: list[list[int]]) -> NDArray[np.int32]:
    signed = [
        [word - 2**WORD if word >= 2 ** (WORD - 1) else word for word in row] for row in words
    ]
    return np.array(signed, np.int32)


def stream(values: list[int], bits: int) -> list[int]:
    """Bit e of value j is bit j * bits + e of the stream; bit B is bit B mod 32 of word B div 32."""
    words = [0] * -(-len(values) * bits // WORD)
    for place, value in enumerate(values):
        for bit in range(bits):
            if value >> bit & 1:
                at = place * bits + bit
                words[at // WORD] += 2 ** (at % WORD)
    return words


def unstreamed(words: list[int], bits: int, count: int) -> list[int]:
    """Undo `stream`, from int32 words."""
    values = []
    for place in range(count):
        value = 0
        for bit in range(bits):
            at = place * bits + bit
            value += (words[at // WORD] % 2**WORD >> at % WORD & 1) << bit
        values.append(value)
    return values


def tens(values: list[int], bits: int) -> list[int]:
    """As many whole values in a word as fit; none straddles."""
    each = WORD // bits
    words = [0] * -(-len(values) // each)
    for place, value in enumerate(values):
        words[place // each] += value << bits * (place % each)
    return words


def awq(linear: Linear) -> dict[str, NDArray[np.generic]]:
    n = linear.shape[0]

    def packed(rows: NDArray[np.uint8]) -> NDArray[np.int32]:
        """(R, N) values to (R, N/8) words."""
        return as_int32(
            [
                [
                    sum(int(row[8 * c + AWQ_ORDER[i]]) << 4 * i for i in range(8))
                    for c in range(n // 8)
                ]
                for row in rows
            ]
        )

    return {
        "qweight": packed(linear.codes.T),
        "qzeros": packed(linear.zeros.T),
        "scales": linear.scales.T.copy(),
    }


def awq_codes(words: NDArray[np.int32]) -> list[list[int]]:
    """(R, C) words to R rows of 8 C values."""
    rows = []
    for row in words.tolist():
        values = [0] * (8 * len(row))
        for c, word in enumerate(row):
            for i in range(8):
                values[8 * c + AWQ_ORDER[i]] = word % 2**WORD >> 4 * i & 15
        rows.append(values)
    return rows


def gptq(linear: Linear, *, minus_one: bool, group: int) -> dict[str, NDArray[np.generic]]:
    k = linear.shape[1]
    top = 2**linear.bits
    columns = [stream(row.tolist(), linear.bits) for row in linear.codes]
    stored = [[(int(z) - minus_one) % top for z in row] for row in linear.zeros.T]
    return {
        "qweight": as_int32(columns).T.copy(),
        "qzeros": as_int32([stream(row, linear.bits) for row in stored]),
        "scales": linear.scales.T.copy(),
        "g_idx": np.array([column // group for column in range(k)], np.int32),
    }


def pack_quantized(
    linear: Linear, *, straddling: bool = True, symmetric: bool = False
) -> dict[str, NDArray[np.generic]]:
    """Signed code + 2^(b-1) is the unsigned one that `linear` holds."""
    put = stream if straddling else tens
    zeros = {} if symmetric else {
        "weight_zero_point": as_int32([put(row.tolist(), linear.bits) for row in linear.zeros.T]).T.copy()
    }  # fmt: skip
    return {
        "weight_packed": as_int32([put(row.tolist(), linear.bits) for row in linear.codes]),
        "weight_scale": linear.scales.copy(),
        "weight_shape": np.array(linear.shape, np.int64),
        **zeros,
    }


def int_quantized(linear: Linear) -> dict[str, NDArray[np.generic]]:
    middle = 2 ** (linear.bits - 1)
    signed = [[int(code) - middle for code in row] for row in linear.codes]
    return {"weight": np.array(signed, np.int8), "weight_scale": linear.scales.copy()}


def awq_settings(group: int) -> dict[str, object]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "GEMM",
    }


def gptq_settings(bits: int, group: int, version: str) -> dict[str, object]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": False,
        "desc_act": False,
        "checkpoint_format": version,
    }


def tensors_settings(
    bits: int, group: int | None, *, symmetric: bool = False, activations: bool = False
) -> dict[str, object]:
    """Of compressed-tensors; a group of None is one scale per row."""
    token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "dynamic": False,
        "actorder": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if activations else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": token if activations else None,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
    }
