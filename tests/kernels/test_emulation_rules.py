"""The emulation itself: small kernels that keep its rules pass, the same kernels broken are reported."""

import ctypes
import re

import numpy as np
import pytest

from tests.kernels.emulated import (
    CASES,
    EMULATION,
    EVERY_ORDER,
    ROOT,
    BlockOrder,
    Buffer,
    Schedule,
    compiled,
    loaded,
)

WORDS = 256
POISONS = (0xFF, 0x5A)

RACE = "race on shared memory"
UNWRITTEN = "read of shared memory that nobody wrote"
MISSING_WAIT = "missing wait"
DIVERGENCE = "divergence"
PARTIAL_WARP = "collective without all 32 lanes"
DEADLOCK = "deadlock"
OUT_OF_BOUNDS = "access out of bounds"
MISALIGNED = "misaligned access"
GLOBAL_RACE = "race on global memory"
UNPUBLISHED = "read of another block's store that was not published"

REPORTED = {
    "neighbour_warp": {RACE},
    "overwritten_word": {RACE},
    "neighbour_lane": {RACE},
    "warp_barrier_for_block": {RACE},
    "matrix_of_others": {RACE},
    "copy_and_read": {MISSING_WAIT},
    "wait_too_short": {MISSING_WAIT},
    "slot_reused_early": {RACE, MISSING_WAIT},
    "copy_left_behind": {"thread ended with copies under way"},
    "unwritten_word": {UNWRITTEN},
    "two_shuffles": {DIVERGENCE},
    "loop_of_shuffles": {DIVERGENCE},
    "early_exit": {PARTIAL_WARP},
    "early_warp": {UNWRITTEN, RACE},
    "two_barriers": {DIVERGENCE},
    "barrier_in_branch": {DEADLOCK},
    "past_the_end": {OUT_OF_BOUNDS},
    "before_the_start": {OUT_OF_BOUNDS},
    "copy_past_the_end": {OUT_OF_BOUNDS},
    "past_shared": {OUT_OF_BOUNDS},
    "misaligned_load": {MISALIGNED},
    "misaligned_shared": {MISALIGNED},
    "misaligned_matrix": {MISALIGNED},
    "store_to_input": {"store to a read-only buffer"},
    "cached_load": {"read-only load of what this launch wrote"},
    "global_exchange": {GLOBAL_RACE},
    "two_writers": {GLOBAL_RACE},
    "half_words": {GLOBAL_RACE},
    "sum_without_fence": {UNPUBLISHED},
    "sum_without_barrier": {UNPUBLISHED, GLOBAL_RACE},
    "wait_for_a_block": {DEADLOCK},
}
"""What each broken kernel is reported as; two names where the order of the threads decides which comes first."""


@pytest.fixture(scope="module")
def rules() -> ctypes.CDLL:
    library = loaded(compiled("rules.so", [CASES / "rules.cu", *EMULATION]))
    library.rules_run.argtypes = [ctypes.c_char_p, ctypes.c_int, *[ctypes.c_void_p] * 4]
    return library


def run(
    library: ctypes.CDLL, name: str, *, broken: bool, order: tuple[int, int, int]
) -> tuple[int, bytes]:
    """Status of one launch, and what it left in its three outputs."""
    given = Buffer.of(np.arange(WORDS, dtype=np.uint32) * 7 + 1)
    outputs = [Buffer(4 * words, writable=True) for words in (WORDS, 1, WORDS)]
    out, tickets, partials = outputs
    out.bytes[:], tickets.bytes[:], partials.bytes[:] = 0xFF, 0, 0xFF
    library.mbq_emulation_forget_all()
    for buffer in (given, *outputs):
        buffer.register(library)
    assert library.mbq_emulation_configure(*order) == 0
    pointers = [buffer.pointer for buffer in (given, *outputs)]
    status = library.rules_run(name.encode(), int(broken), *pointers)
    for buffer in (given, *outputs):
        buffer.assert_guards_intact()
    library.mbq_emulation_forget_all()
    return status, b"".join(buffer.bytes.tobytes() for buffer in outputs)


def test_every_case_of_the_source_is_listed_here() -> None:
    source = (CASES / "rules.cu").read_text()
    assert set(re.findall(r"CASE\((\w+), \d\)", source)) == set(REPORTED)


@pytest.mark.parametrize("name", REPORTED)
def test_a_sound_kernel_gives_the_same_bytes_in_every_order(rules: ctypes.CDLL, name: str) -> None:
    results = set()
    for order in EVERY_ORDER:
        for poison in POISONS:
            rules.mbq_emulation_poison(poison)
            status, left = run(rules, name, broken=False, order=order)
            assert status == 0, rules.mbq_emulation_message().decode()
            results.add(left)
    assert len(results) == 1


@pytest.mark.parametrize("name", REPORTED)
def test_a_broken_kernel_is_reported_in_every_order(rules: ctypes.CDLL, name: str) -> None:
    for order in EVERY_ORDER:
        status, _ = run(rules, name, broken=True, order=order)
        message = rules.mbq_emulation_message().decode()
        assert status >= 10000
        assert any(message.startswith(what) for what in REPORTED[name]), message


def test_a_report_names_both_lines_of_the_kernel_and_the_threads(rules: ctypes.CDLL) -> None:
    source = (CASES / "rules.cu").read_text().splitlines()
    begin = next(i for i, line in enumerate(source) if "MBQ_KERNEL neighbour_warp" in line)
    write = next(i for i in range(begin, begin + 9) if "load4(p.in + t)" in source[i]) + 1
    read = next(i for i in range(begin, begin + 9) if "t ^ 32" in source[i]) + 1
    run(rules, "neighbour_warp", broken=True, order=(Schedule.FORWARD, 0, BlockOrder.FORWARD))
    assert rules.mbq_emulation_message().decode() == (
        f"race on shared memory: byte 128, read by thread 0 at rules.cu:{read} and write by thread 32 at "
        f"rules.cu:{write}, no barrier between (block 0 0 0, forward schedule, seed 0)"
    )


def test_a_deadlock_says_where_everybody_waits(rules: ctypes.CDLL) -> None:
    run(rules, "barrier_in_branch", broken=True, order=(Schedule.FORWARD, 0, BlockOrder.FORWARD))
    message = rules.mbq_emulation_message().decode()
    assert re.search(
        r"64 from thread 0 \(warp 0, lane 0\) on wait for a block barrier at rules\.cu:\d+; "
        r"64 from thread 1 \(warp 0, lane 1\) on wait for a warp barrier at rules\.cu:\d+",
        message,
    )


def test_a_launch_after_a_fault_starts_afresh(rules: ctypes.CDLL) -> None:
    order = (Schedule.FORWARD, 0, BlockOrder.FORWARD)
    _, before = run(rules, "copy_and_read", broken=False, order=order)
    assert run(rules, "copy_and_read", broken=True, order=order)[0] >= 10000
    assert run(rules, "copy_and_read", broken=False, order=order) == (0, before)
    assert rules.mbq_emulation_message() == b""


def test_touching_memory_that_nobody_registered_is_out_of_bounds(rules: ctypes.CDLL) -> None:
    rules.mbq_emulation_forget_all()
    buffers = [Buffer(4 * WORDS, writable=True) for _ in range(4)]
    status = rules.rules_run(b"neighbour_warp", 0, *(buffer.pointer for buffer in buffers))
    assert status >= 10000
    assert b"no buffer is registered" in rules.mbq_emulation_message()


def test_overlapping_buffers_and_unknown_schedules_are_refused(rules: ctypes.CDLL) -> None:
    buffer = Buffer(512)
    buffer.register(rules)
    assert rules.mbq_emulation_register(buffer.pointer + 256, 512, 0) < 0
    assert rules.mbq_emulation_register(None, 512, 0) < 0
    buffer.register(rules)
    rules.mbq_emulation_forget_all()
    assert rules.mbq_emulation_configure(4, 0, 0) < 0
    assert rules.mbq_emulation_configure(0, 0, -1) < 0


def test_only_one_header_speaks_to_the_device() -> None:
    words = r"\basm\b|__half|__nv_|__shfl|__sync|__ld|__f\w+_r[nz]|threadIdx|blockIdx|blockDim|gridDim|<<<|cuda_\w+\.h"
    folders = [ROOT / "kernels/include/mbq", ROOT / "kernels/src"]
    speaking = {
        path.name
        for folder in folders
        for path in folder.iterdir()
        if re.search(words, re.sub(r"//.*", "", path.read_text()))
    }
    assert speaking == {"arch.cuh"}
