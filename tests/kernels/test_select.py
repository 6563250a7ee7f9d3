"""Selection needs no device: a legal config for every problem, scratch that suffices, the start rule as written."""

import ctypes
import random
from math import ceil
from typing import Final

import pytest

from mbq_export.schemes import SCHEMES
from mbq_kernels.library import (
    SCHEME_IDS,
    ConfigStruct,
    DeviceStruct,
    KernelLibrary,
    LinearCall,
)
from tests.kernels.emulated_linear import Emulator

SKINNY: Final = 1
DEVICES: Final = {  # SMs, bytes of shared memory per block, KiB in flight an SM needs, threads of an SM
    80: (108, 163 << 10, 18, 2048),
    86: (82, 99 << 10, 11, 1536),
    87: (16, 163 << 10, 10, 1536),
    89: (128, 99 << 10, 6, 1536),
    90: (132, 227 << 10, 24, 2048),
    110: (20, 227 << 10, 14, 1536),
    120: (170, 99 << 10, 10, 1536),
}
REAL_SHAPES: Final = (
    *((896, 896), (4864, 896), (896, 4864), (3584, 3584), (4608, 3584), (18944, 3584)),
    *((37888, 3584), (3584, 18944), (4096, 4096), (11008, 4096), (4096, 11008), (152064, 3584)),
    *((8192, 8192), (29568, 8192), (8192, 29568)),
)


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    return Emulator.unbroken().library


@pytest.fixture(scope="module")
def configs(library: KernelLibrary) -> dict[int, dict[str, int]]:
    return {config["id"]: config for config in library.configs()}


def call_of(
    n: int, k: int, *, scheme: str = "w3a16", group_size: int | None = None, epilogue: str = "none"
) -> LinearCall:
    """A problem; no pointer is ever followed."""
    return LinearCall(
        scheme=scheme,
        dtype="float16",
        n=n,
        k=k,
        group_size=SCHEMES[scheme].group_size if group_size is None else group_size,
        codes=16,
        scales=16,
        zeros=16,
        epilogue=epilogue,
    )


def device_of(sm: int) -> DeviceStruct:
    """The GPU that stands for an SM number."""
    sms, shared, _, _ = DEVICES[sm]
    return DeviceStruct(sm=sm, sm_count=sms, smem_optin=shared, l2_bytes=32 << 20)


def start_rule(n: int, k: int, sm: int) -> tuple[int, int, int, int]:
    """Tiles per warp, warps, tiles on their way, parts of K: the rule for M <= 8 and groups of 128."""
    sms, _, need_kib, threads = DEVICES[sm]
    tiles = 1 if n <= 8192 else 2
    depth, registers, most = (2, 120, 16) if tiles == 1 else (1, 144, 8)
    k_tiles, blocks = ceil(k / 128), ceil(n / (16 * tiles))

    def fills(count: int) -> bool:
        return ceil(count / sms) * sms <= 1.1 * count

    splits = 1
    if 3 * n * k // 8 // sms >= 65536 and not fills(blocks):
        splits = next((s for s in (2, 4) if fills(blocks * s) and k_tiles // s >= 8), 1)
    part = ceil(k_tiles / splits)

    def resident(warps: int) -> int:
        return min(65536 // (registers * 32 * warps), threads // (32 * warps))

    def in_flight(warps: int) -> float:
        return min(resident(warps), blocks * splits / sms) * warps * tiles * 768 * depth

    able = [w for w in (4, 7, 8, 14, 16) if w <= most and ceil(part / w) >= 2]
    even = [w for w in able if ceil(part / w) * w <= 1.1 * part]
    at_once = [w for w in even if resident(w) * sms >= blocks * splits]
    able = at_once or even or able or [4]
    warps = next((w for w in able if in_flight(w) >= need_kib * 1024), able[-1])
    return tiles, warps, depth, splits


@pytest.mark.parametrize("sm", DEVICES)
def test_selection_follows_the_start_rule(
    library: KernelLibrary, configs: dict[int, dict[str, int]], sm: int
) -> None:
    for n, k in REAL_SHAPES:
        config = configs[library.select(call_of(n, k), m=1, sm=sm)]
        found = config["n_tiles"], config["warps"], config["depth"], config["splits"]
        assert found == start_rule(n, k, sm), f"{n} x {k}"


def test_start_rule_knows_the_examples_of_an_h100() -> None:
    assert start_rule(3584, 3584, 90) == (1, 7, 2, 1)
    assert start_rule(18944, 3584, 90) == (2, 7, 1, 2)
    assert start_rule(37888, 3584, 90) == (2, 7, 1, 1)
    assert start_rule(3584, 18944, 90) == (1, 4, 2, 4)


def test_every_problem_gets_a_legal_config_and_enough_scratch(
    library: KernelLibrary, configs: dict[int, dict[str, int]]
) -> None:
    draw = random.Random(0)
    for _ in range(4000):
        scheme = draw.choice(list(SCHEME_IDS))
        group_size = draw.choice(SCHEMES[scheme].group_sizes)
        k = (group_size or 8) * draw.randint(1, 600 if group_size else 9000)
        epilogue = draw.choice(["none", "none", "silu_mul"])
        n = draw.randint(1, 4000) * (32 if epilogue == "silu_mul" else draw.choice([1, 16]))
        call = call_of(n, k, scheme=scheme, group_size=group_size, epilogue=epilogue)
        m, sm = draw.choice([1, 2, 7, 8, 9, 16, 33, 64, 65, 300, 4096]), draw.choice(list(DEVICES))
        device = device_of(sm)
        chosen = library.select_on(call, m=m, device=device)
        assert chosen in configs, (call, m, sm, chosen)
        assert library.legal(call, m=m, config=chosen, device=device) == 0, (call, m, sm, chosen)
        assert library.select(call, m=m, sm=sm) == chosen
        assert (configs[chosen]["family"] == SKINNY) == (m <= 8)
        # Scratch for many rows serves fewer, too.
        assert library.workspace_bytes(call, max_m=m) >= library.workspace_bytes(call, max_m=m - 1)


def test_ids_are_unique_and_keep_their_meaning(configs: dict[int, dict[str, int]]) -> None:
    assert len(configs) == len({tuple(c.values()) for c in configs.values()})
    meaning = [configs[1], configs[17], configs[45]]
    assert [(c["n_tiles"], c["warps"], c["depth"], c["splits"]) for c in meaning] == [
        (1, 4, 2, 1),
        (2, 4, 1, 2),
        (2, 16, 2, 4),
    ]


def test_an_old_device_gets_nothing(library: KernelLibrary) -> None:
    no_image = -12
    assert library.select(call_of(4096, 4096), m=1, sm=75) == no_image


def test_an_unknown_newer_device_gets_a_config(
    library: KernelLibrary, configs: dict[int, dict[str, int]]
) -> None:
    assert library.select(call_of(4096, 4096), m=1, sm=130) in configs


def test_describing_a_config_out_of_range_is_refused(library: KernelLibrary) -> None:
    count, struct = library.cdll.mbq_config_count(), ctypes.create_string_buffer(64)
    for index in (-1, count):
        assert library.cdll.mbq_config(index, ctypes.cast(struct, ctypes.POINTER(ConfigStruct))) < 0
