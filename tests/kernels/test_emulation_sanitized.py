"""The emulated kernels and the emulation itself under the sanitizers of the compiler."""

import os
import subprocess
import sys

import pytest

from tests.kernels.emulated import ROOT


def runtime(name: str) -> str:
    """Path of a sanitizer's library; an uninstrumented Python has to load it first."""
    asked = ["g++", f"-print-file-name={name}"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_touch_only_their_own_memory_and_do_nothing_undefined() -> None:
    environment = {
        **os.environ,
        "MBQ_EMULATED_FLAGS": "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # of the interpreter
    }
    chosen = [ROOT / "tests/kernels/test_emulation.py", "-k", "block_may or alone or calls_repeat"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "timeout=800",
            *chosen,
        ],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
