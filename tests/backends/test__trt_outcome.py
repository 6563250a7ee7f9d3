"""Every way a TensorRT child can end, driven through the real parent with children that really end that way."""

import os
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mbq_export.backends import _tensorrt
from mbq_export.backends._trt_flavour import FLAVOURS, Installed
from mbq_export.backends._trt_job import Job, Result
from mbq_export.backends._trt_outcome import MEANINGS, Story
from mbq_export.errors import MbqError

INSTALLED = Installed(
    flavour=FLAVOURS["rtx"], module="none", version="1.7.1", library=Path("/none.so.1")
)


def job(workdir: Path) -> Job:
    workdir.mkdir(exist_ok=True)
    return Job(
        op="build",
        workdir=workdir,
        flavour="rtx",
        module=INSTALLED.module,
        link=INSTALLED.flavour.link,
        library=str(INSTALLED.library),
    )


def end_with(tmp_path: Path, code: str, *, timeout_s: float = 30.0) -> Result:
    """Run a child that does ``code`` instead of TensorRT's work, and interpret its end."""
    worker = (sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(code))
    return _tensorrt.run_job(
        job(tmp_path / "work"),
        INSTALLED,
        timeout_s=timeout_s,
        worker=worker,
        logs=tmp_path / "logs",
    ).result


def failure(tmp_path: Path, code: str, *, timeout_s: float = 30.0) -> MbqError:
    with pytest.raises(MbqError) as error:
        end_with(tmp_path, code, timeout_s=timeout_s)
    return error.value


SAY = """
import os, signal, sys
os.write(1, b"[mbq] stage build\\n[11/21/2026-19:47:27] [TRT] [V] Building graph\\n")
"""

ANSWER = """
import sys
from pathlib import Path
from mbq_export.backends._trt_job import Result
Result({fields}).write(Path())
"""


def test_answer_of_a_child_is_returned(tmp_path: Path) -> None:
    result = end_with(tmp_path, ANSWER.format(fields="version='1.7.1', network_layers=9"))
    assert (result.version, result.network_layers) == ("1.7.1", 9)
    assert not (tmp_path / "logs").exists()


def test_answer_counts_even_if_the_process_dies_afterwards(tmp_path: Path) -> None:
    code = ANSWER.format(fields="network_layers=9") + "import os\nos.abort()\n"
    assert end_with(tmp_path, code).network_layers == 9


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL"])
def test_crash_names_signal_stage_last_message_and_log(tmp_path: Path, name: str) -> None:
    error = failure(tmp_path, SAY + f"os.kill(os.getpid(), signal.{name})")
    assert error.code == "E6003"
    assert error.message == f"TensorRT died of {name} in build. Last message: Building graph"
    assert str(tmp_path / "logs") in error.fix[0]
    assert "Building graph" in (tmp_path / "logs" / "native.log").read_text()
    assert (tmp_path / "logs" / "job.json").exists()


def test_crash_quotes_the_stack_of_the_child(tmp_path: Path) -> None:
    error = failure(tmp_path, "import ctypes; ctypes.string_at(0)")
    assert error.code == "E6003"
    assert "Segmentation fault" in (tmp_path / "logs" / "native.log").read_text()
    assert "string_at" in error.why


def test_abort_over_the_library_name_is_its_own_error(tmp_path: Path) -> None:
    code = 'import os; os.write(2, b"terminate called without an active exception\\n"); os.abort()'
    error = failure(tmp_path, code)
    assert error.code == "E3013"
    assert "terminate called without an active exception" in error.message
    assert 'pip install "mbq-export[rtx]"' in error.fix


def test_kill_by_somebody_else_is_memory(tmp_path: Path) -> None:
    code = SAY + "x = bytearray(300 << 20)\nos.kill(os.getpid(), signal.SIGKILL)"
    error = failure(tmp_path, code)
    assert error.code == "E5004"
    assert error.message == "TensorRT was killed in build, having used 0.3 GiB."
    assert "memory" in error.why


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ('os.write(2, b"what():  std::bad_alloc\\n"); os.abort()', "std::bad_alloc"),
        ("raise MemoryError", "MemoryError"),
        ('raise RuntimeError("can\'t start new thread")', "can't start new thread"),
    ],
)
def test_death_for_want_of_memory_is_memory(tmp_path: Path, code: str, words: str) -> None:
    error = failure(tmp_path, SAY + code)
    assert error.code == "E5004"
    assert error.message.startswith("TensorRT ran out of memory in build, having used")
    assert words in error.why


def test_hung_child_is_ended_and_the_option_named(tmp_path: Path) -> None:
    started = time.monotonic()
    error = failure(tmp_path, SAY + "import time\ntime.sleep(60)", timeout_s=3)
    assert error.code == "E5006"
    assert error.message == "TensorRT was still in build after 3 s and was ended."
    assert error.fix[0] == "--engine-timeout 12"
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0),
        ("raise SystemExit(3)", 3),
        ("open('result.json', 'w').write('{\"schema\": 9}')", 0),
    ],
)
def test_child_without_an_answer_is_a_bug_of_ours(tmp_path: Path, code: str, status: int) -> None:
    error = failure(tmp_path, code)
    assert error.code == "E9001"
    assert error.message == f"The TensorRT child left with status {status} and without a result."
    assert str(tmp_path / "logs") in error.fix[0]


def test_exception_in_the_child_is_quoted(tmp_path: Path) -> None:
    error = failure(tmp_path, "raise ValueError('unforeseen')")
    assert error.code == "E9001"
    assert "ValueError: unforeseen" in error.why


@pytest.mark.parametrize("kind", sorted(MEANINGS))
def test_every_refusal_has_a_code_a_reason_and_a_cure(tmp_path: Path, kind: str) -> None:
    fields = f"kind={kind!r}, message='It said no.', details=('node a', 'node b')"
    error = failure(tmp_path, ANSWER.format(fields=fields))
    assert error.code == MEANINGS[kind].code
    assert error.message == "It said no. node a; node b"
    assert error.why
    assert all(error.fix)
    assert "INSTALL" not in error.fix


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 1073741824 bytes.)", "E5004"),
        ("Unexpected exception std::bad_alloc", "E5004"),
        ("No implementation found for node", "E6002"),
    ],
)
def test_builder_without_an_engine_is_judged_by_its_log(
    tmp_path: Path, line: str, code: str
) -> None:
    says = f"print('[11/21/2026-19:47:27] [TRT] [E] {line}', flush=True)\n"
    answer = ANSWER.format(fields="kind='trt-build', message='The builder returned no engine.'")
    error = failure(tmp_path, says + answer)
    assert error.code == code
    assert line in error.message


def test_missing_driver_is_not_quoted_as_the_reason(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "[mbq] stage parse\n"
        "[11/21/2026-19:47:27] [TRT] [E] the reason\n"
        "[11/21/2026-19:47:27] [TRT] [E] catchCudaError (cudaError 35: driver is insufficient)\n"
        "[11/21/2026-19:47:27] [TRT] [W] a warning\n"
        "a line of somebody else\n"
    )
    story = Story.read(log)
    assert (story.stage, story.errors, story.warnings) == ("parse", ("the reason",), ("a warning",))
    assert story.last == "a warning"


def test_story_of_a_missing_log_is_empty(tmp_path: Path) -> None:
    assert Story.read(tmp_path / "none").stage == "start"


def test_timed_out_child_is_gone_when_the_error_arrives(tmp_path: Path) -> None:
    code = f"""
        import os, time
        open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
        time.sleep(60)
    """
    failure(tmp_path, code, timeout_s=3)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
