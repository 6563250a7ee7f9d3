"""Ask a bundle about pictures: tokens stream, a last line of statistics."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbq_export.commands import options
from mbq_export.commands.console import CONTROL, Console
from mbq_export.errors import GateError, MbqError, UsageError
from mbq_export.writing import explained

if TYPE_CHECKING:
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
    backend: options.Backend = "ort",
    lowering: options.Lowering = "qdq",
    threads: options.Threads = 0,
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
    from mbq_export.runtime import open_session
    from mbq_export.runtime.sampling import Options

    wanted = Options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=console.seed,
        stop=tuple(stop or ()),
    )
    opened = Bundle.open(bundle)
    with open_session(opened, backend=backend, lowering=lowering, threads=threads) as session:
        if jsonl is not None:
            _batch(console, session, jsonl, out, wanted)
        else:
            _single(
                console, session, _text_of(prompt or ""), tuple(image or ()), wanted, stream=stream
            )


def _text_of(prompt: str) -> str:
    """Read ``@FILE`` and ``-``; anything else is the text itself."""
    if prompt == "-":
        return sys.stdin.read()
    if not prompt.startswith("@"):
        return prompt
    path = Path(prompt[1:])
    if not path.is_file():
        raise UsageError(
            "E2002",
            f"--prompt {prompt} names no file.",
            why="@ reads the prompt from a file",
            fix="--prompt @question.txt",
        )
    return path.read_text("utf-8")


def _single(
    console: Console,
    session: "Session",
    prompt: str,
    paths: tuple[Path, ...],
    wanted: "Options",
    *,
    stream: bool,
) -> None:
    from mbq_export.families.pictures import read_picture

    going = session.stream(prompt, [read_picture(path) for path in paths], options=wanted)
    if stream and not console.as_json:
        for token in going:
            sys.stdout.write(_printable(token.text))
            sys.stdout.flush()
        sys.stdout.write("\n")
    done = going.result()
    if not stream:
        console.text(_printable(done.text))
    console.note(done.statistics.line())
    console.finish(_answer(done), what=f"{done.statistics.output_tokens} tokens, {done.reason}")


def _batch(
    console: Console, session: "Session", source: Path, out: Path | None, wanted: "Options"
) -> None:
    """One result line per input line, flushed; finished ids are not asked again."""
    if out is None:
        raise UsageError(
            "E2002",
            "--jsonl needs -o.",
            why="results go to a file, one line each",
            fix="-o answers.jsonl",
        )
    finished = {entry.get("id") for entry in _lines(out)} if out.exists() else set()
    todo = [entry for entry in _lines(source) if entry.get("id") not in finished]
    failed = 0
    with explained(out):
        out.touch()
    with console.progress("run") as progress:
        for index, entry in enumerate(todo):
            result = _answer_line(session, entry, source.parent, wanted)
            failed += "error" in result
            with explained(out), out.open("a", encoding="utf-8") as sink:
                sink.write(json.dumps(result, ensure_ascii=False) + "\n")
            progress(index + 1, len(todo))
    if failed:
        raise GateError(
            "E1107",
            f"{failed} of {len(todo)} lines failed.",
            why="each has an error object in the results",
            fix=f"see {out}",
        )
    console.finish(
        {"answered": len(todo), "kept": len(finished), "out": str(out)},
        what=f"{len(todo)} answers in {out}",
    )


def _answer_line(
    session: "Session", entry: dict[str, Any], folder: Path, wanted: "Options"
) -> dict[str, Any]:
    from mbq_export.families.pictures import read_picture
    from mbq_export.reading import contained

    try:
        if not isinstance(entry.get("prompt"), str):
            raise UsageError(
                "E2002",
                "The line has no prompt.",
                why='{"id": ..., "prompt": ..., "images": [...]}',
            )
        images = [
            read_picture(contained(folder, name, code="E4305")) for name in entry.get("images", [])
        ]
        return {
            "id": entry.get("id"),
            **_answer(session.generate(entry["prompt"], images, options=wanted)),
        }
    except MbqError as error:
        return {
            "id": entry.get("id"),
            "error": {"code": f"MBQ-{error.code}", "message": error.message},
        }


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    from mbq_export.reading import read_jsonl

    return (entry for _, entry in read_jsonl(path))


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
