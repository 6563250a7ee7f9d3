"""Ask a bundle about pictures: tokens stream, a last line of statistics."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbq_export.commands import options
from mbq_export.commands.console import CONTROL, Console
from mbq_export.errors import FormatError, GateError, MbqError, UsageError
from mbq_export.native import CALL_SECONDS
from mbq_export.reading import contained, read_jsonl
from mbq_export.writing import explained, write_file

if TYPE_CHECKING:
    from PIL.Image import Image

    from mbq_export.runtime.sampling import Options
    from mbq_export.runtime.session import Session
    from mbq_export.runtime.stream import Generation


def command(
    context: typer.Context,
    bundle: options.BundlePath,
    prompt: Annotated[
        str | None,
        typer.Option(
            "-p",
            "--prompt",
            help="The question; @FILE reads it from a file, - from stdin.",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("-i", "--image", help="A picture; repeatable.", show_default=False),
    ] = None,
    jsonl: Annotated[
        Path | None,
        typer.Option(
            "--jsonl",
            help="Batch: one {id, prompt, images} per line; needs -o.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Results of --jsonl, one line each.", show_default=False),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print text as it comes.")
    ] = True,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Most tokens to generate.")
    ] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Probability mass to draw from.")] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="Text that ends the answer; repeatable.", show_default=False),
    ] = None,
    backend: options.Runner = "ort",
    device: Annotated[
        str, typer.Option("--device", help="Of --backend torch: auto, cpu or cuda.")
    ] = "auto",
    lowering: options.Lowering = None,
    threads: options.Threads = 0,
    engine_timeout: options.EngineTimeout = CALL_SECONDS,
) -> None:
    """Ask a bundle about pictures.

    mbq-export run out --image scene.png --prompt "how many objects are there ?"
    """
    console: Console = context.obj
    if (prompt is None) == (jsonl is None):
        raise UsageError(
            "E2002",
            "run takes either --prompt or --jsonl."
            if prompt is None
            else "run got both --prompt and --jsonl.",
            why="one question, or a file of them",
            fix=('--prompt "what is shown ?"', "--jsonl questions.jsonl -o answers.jsonl"),
        )
    from mbq_export.bundle import Bundle
    from mbq_export.families.pictures import read_picture
    from mbq_export.runtime import AUTO, TORCH, Tuning, open_session
    from mbq_export.runtime.sampling import Options

    if device != AUTO and backend != TORCH:
        raise UsageError(
            "E2002",
            f"--device {device} does not go with --backend {backend}.",
            why="only the torch backend chooses its device",
            fix=f"--backend {TORCH} --device {device}",
        )
    wanted = Options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=console.seed,
        stop=tuple(stop or ()),
    )
    opened = Bundle.open(bundle)
    # Whatever can be wrong with the question is found before a model is loaded.
    question = _text_of(prompt or ""), [read_picture(path) for path in image or ()]
    batch = None if jsonl is None else _Batch.open(jsonl, out)
    backend = backend if device == AUTO else f"{TORCH}:{device}"
    with open_session(
        opened,
        backend=backend,
        lowering=lowering,
        threads=threads,
        tuning=Tuning(engine_timeout_s=engine_timeout),
    ) as session:
        if batch is not None:
            _answer_batch(console, session, batch, wanted)
        else:
            _answer_one(console, session, question, wanted, stream=stream)


def _text_of(prompt: str) -> str:
    """Read ``@FILE`` and ``-``; anything else is the text itself."""
    if prompt == "-":
        return sys.stdin.read()
    if not prompt.startswith("@"):
        return prompt
    try:
        return Path(prompt[1:]).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "E2002",
            f"--prompt {prompt} names no text file.",
            why=f"@ reads the prompt from a file in UTF-8: {error.strerror if isinstance(error, OSError) else error.reason}",
            fix="--prompt @question.txt",
        ) from error


def _answer_one(
    console: Console,
    session: "Session",
    question: tuple[str, list["Image"]],
    wanted: "Options",
    *,
    stream: bool,
) -> None:
    prompt, pictures = question
    going = session.stream(prompt, pictures, options=wanted)
    if not console.as_json:
        for text in (token.text for token in going) if stream else [going.result().text]:
            sys.stdout.write(_printable(text))
            sys.stdout.flush()
        sys.stdout.write("\n")
    done = going.result()
    console.note(done.statistics.line())
    console.finish(_answer(done), what=f"{done.statistics.output_tokens} tokens, {done.reason}")


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Questions of a file, and where their answers go.

    Attributes:
        todo: Lines without an answer.
        kept: How many have one from an earlier run.
        folder: Pictures are named relative to it.
        out: One result per line.
    """

    todo: list[dict[str, Any]]
    kept: int
    folder: Path
    out: Path

    @classmethod
    def open(cls, source: Path, out: Path | None) -> "_Batch":
        """Read the questions, and the results there are already; failed ones are asked again."""
        if out is None:
            raise UsageError(
                "E2002",
                "--jsonl needs -o.",
                why="results go to a file, one line each",
                fix="-o answers.jsonl",
            )
        lines = [{"id": number, **entry} for number, entry in read_jsonl(source)]
        results = [entry for _, entry in read_jsonl(out)] if out.exists() else []
        good = [entry for entry in results if "error" not in entry]
        write_file(out, "".join(map(_line, good)).encode())
        finished = {str(entry.get("id")) for entry in good}
        todo = [entry for entry in lines if str(entry["id"]) not in finished]
        return cls(todo=todo, kept=len(lines) - len(todo), folder=source.parent, out=out)


def _answer_batch(console: Console, session: "Session", batch: _Batch, wanted: "Options") -> None:
    """One result line per input line, written at once; finished ids are not asked again."""
    failed = 0
    with console.progress("run") as progress:
        for index, entry in enumerate(batch.todo):
            result = _answer_line(session, entry, batch.folder, wanted)
            failed += "error" in result
            with explained(batch.out), batch.out.open("a", encoding="utf-8") as sink:
                sink.write(_line(result))
            progress(index + 1, len(batch.todo))
    if failed:
        raise GateError(
            "E1107",
            f"{failed} of {len(batch.todo)} lines failed.",
            why="each has an error object in the results",
            fix=f"see {batch.out}, mend the lines and run the same command again",
        )
    console.finish(
        {"answered": len(batch.todo), "kept": batch.kept, "out": str(batch.out)},
        what=f"{len(batch.todo)} answers in {batch.out}",
    )


def _answer_line(
    session: "Session", entry: dict[str, Any], folder: Path, wanted: "Options"
) -> dict[str, Any]:
    from mbq_export.families.pictures import read_picture

    try:
        prompt, names = _asked(entry)
        images = [read_picture(contained(folder, name, code="E4305")) for name in names]
        return {
            "id": entry["id"],
            **_answer(session.generate(prompt, images, options=wanted)),
        }
    except MbqError as error:
        return {
            "id": entry["id"],
            "error": {"code": f"MBQ-{error.code}", "message": error.message},
        }


def _asked(entry: dict[str, Any]) -> tuple[str, list[str]]:
    prompt, images = entry.get("prompt"), entry.get("images", [])
    images = [images] if isinstance(images, str) else images
    named = isinstance(images, list) and all(isinstance(name, str) for name in images)
    if not isinstance(prompt, str) or not named:
        raise FormatError(
            "E4303",
            "The line has no prompt." if named else "The line's images are no list of paths.",
            why='a line looks like {"id": "1", "prompt": "what is shown ?", "images": ["a.png"]}',
        )
    return prompt, images


def _line(result: dict[str, Any]) -> str:
    return json.dumps(result, ensure_ascii=False) + "\n"


def _answer(done: "Generation") -> dict[str, Any]:
    return {
        "text": done.text,
        "tokens": len(done.ids),
        "reason": done.reason,
        "collapsed": done.collapsed,
        "statistics": done.statistics.as_json(),
    }


def _printable(text: str) -> str:
    """A model's text must not drive the terminal."""
    return CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)
