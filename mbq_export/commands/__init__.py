"""The command line: a table of commands, and the one place where errors become exit statuses.

Nothing here computes. A command file declares its options, calls one function of a stage, prints one thing.
"""

import signal
import sys
from collections.abc import Sequence
from typing import Final

import typer

from mbq_export.commands import (
    bench,
    build,
    calibrate,
    doctor,
    explain,
    export,
    inspect,
    models,
    plugins,
    quantize,
    report,
    run,
    validate,
)
from mbq_export.commands.console import Console, run_guarded
from mbq_export.commands.options import GLOBAL_HELP, hoist_globals, take_globals

COMMANDS: Final = (
    build,
    calibrate,
    quantize,
    export,
    validate,
    run,
    bench,
    report,
    inspect,
    doctor,
    models,
    plugins,
    explain,
)

PANELS: Final = {
    "build": "Make",
    "calibrate": "Make",
    "quantize": "Make",
    "export": "Make",
    "validate": "Check",
    "doctor": "Check",
    "inspect": "Check",
    "run": "Use",
    "bench": "Use",
    "report": "Use",
    "models": "Look up",
    "plugins": "Make",
    "explain": "Look up",
}

app = typer.Typer(
    name="mbq-export",
    help="From a vision-language model to a 3-bit TensorRT engine, checked at every step.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.callback(epilog=GLOBAL_HELP)(take_globals)
for _module in COMMANDS:
    _name = _module.__name__.rpartition(".")[2]
    app.command(_name, rich_help_panel=PANELS[_name], epilog=GLOBAL_HELP)(_module.command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and end the process with its exit status."""
    # A request to end is an interrupt: finished work is kept, locks are released.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    argv = hoist_globals(list(sys.argv[1:] if arguments is None else arguments))
    sys.exit(run_guarded(app, argv, Console()))
