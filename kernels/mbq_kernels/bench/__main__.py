"""The benchmark from a checkout: needs torch, numpy and the built library, nothing else.

python kernels/bench.py                          time the short suite
python kernels/bench.py --suite full -o results  everything, under 10 minutes on an H100
python kernels/bench.py --dry-run                rehearse on a machine without a GPU
python kernels/bench.py tune --shapes 18944x3584 time every config and rewrite the table of this card
python kernels/bench.py table                    rewrite include/mbq/tuning.inc from the tables
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from mbq_export.errors import MbqError
from mbq_kernels.bench.document import failures, json_text, write_result
from mbq_kernels.bench.machine import ROOT
from mbq_kernels.bench.page import page
from mbq_kernels.bench.run import Request, chosen_suite, open_rig, run
from mbq_kernels.bench.shapes import FULL, SHORT, SUITES, shapes_of
from mbq_kernels.bench.summary import summary
from mbq_kernels.bench.tune import merged, tune
from mbq_kernels.bench.tuning_table import BUCKETS, FOLDER, check_table, inc_text, read_tables

EXIT_WRONG: Final = 1
INC_FILE: Final = ROOT / "kernels" / "include" / "mbq" / "tuning.inc"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except MbqError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kernels/bench.py", description=(__doc__ or "").partition("\n")[0]
    )
    parser.set_defaults(command=_bench)
    _shared(parser)
    parser.add_argument("--suite", choices=sorted(SUITES), default=SHORT.name)
    parser.add_argument("--peers", default="auto", help="auto, none, or packages: torch,gemlite")
    parser.add_argument("--dry-run", action="store_true", help="rehearse without a GPU")
    parser.add_argument("--no-decode", action="store_true", help="leave out the whole decoder")
    parser.add_argument("-o", "--out", type=Path, help="folder for kernels.json and kernels.md")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    more = parser.add_subparsers(metavar="tune | table")
    tuner = more.add_parser("tune", help="time every config and rewrite the table of this card")
    _shared(tuner)
    tuner.add_argument("--rows", default="", help="only buckets with these M, for example 1,8")
    tuner.set_defaults(command=_tune)
    more.add_parser("table", help="rewrite include/mbq/tuning.inc").set_defaults(command=_table)
    return parser


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default="", help="NxK,... in place of the suite's")
    parser.add_argument("--library", type=Path, help="the compiled kernels")


def _bench(arguments: argparse.Namespace) -> int:
    request = Request(
        suite=chosen_suite(SUITES[arguments.suite], _shapes(arguments)),
        peers=arguments.peers,
        library=arguments.library,
        dry_run=arguments.dry_run,
        decode=not arguments.no_decode,
    )

    def keep(result: dict[str, Any]) -> None:
        if arguments.out is not None:
            write_result(arguments.out, result, page(result))

    result = run(request, progress=_say, keep=keep)
    keep(result)
    if arguments.json:
        sys.stdout.write(json_text(result))
    else:
        sys.stdout.writelines(f"{line}\n" for line in summary(result))
    wrong = failures(result)
    sys.stderr.writelines(f"WRONG  {line}\n" for line in wrong)
    return EXIT_WRONG if wrong else 0


def _tune(arguments: argparse.Namespace) -> int:
    """Tune, then write the table of this SM; `table` makes C++ of it."""
    rig = open_rig(arguments.library, progress=_say)
    wanted = {int(m) for m in arguments.rows.split(",") if m.isdecimal()}
    buckets = [b for b in BUCKETS if not wanted or any(b[0] <= m <= b[1] for m in wanted)]
    shapes = _shapes(arguments) or FULL.shapes
    table = merged(rig, tune(rig, shapes, buckets=buckets), FOLDER)
    path = FOLDER / f"sm_{table['sm']}.json"
    check_table(table, name=path.name)
    FOLDER.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    sys.stdout.write(f"{path.name}: {len(table['entries'])} entries\n")
    return _table(arguments)


def _table(_: argparse.Namespace) -> int:
    INC_FILE.write_text(inc_text(read_tables()))
    sys.stdout.write(f"{INC_FILE.name} written; build the library again\n")
    return 0


def _shapes(arguments: argparse.Namespace) -> tuple[Any, ...]:
    return shapes_of(arguments.shapes) if arguments.shapes else ()


def _say(done: int, total: int, note: str = "") -> None:
    sys.stderr.write(f"{done}/{total}  {note}\n")


if __name__ == "__main__":
    sys.exit(main())
