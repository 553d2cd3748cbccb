"""The command line: one module a verb.

Nothing numerical is imported before a verb needs it.
"""

from __future__ import annotations

import errno
import os
import sys

import typer

from ._certify import certify
from ._common import FAILED, INTERRUPTED, USAGE
from ._doctor import doctor
from ._list import list_rows, show
from ._race import race
from ._report import report
from ._results import results
from ._run import run
from ._sharpness import sharpness
from ._transport import transport

__all__ = ["FAILED", "INTERRUPTED", "USAGE", "app", "main"]

_HELP = """Published optimisation and variational methods, their claims executable.

Exit codes: 0 all went well (also when a claim is not held), 1 a run failed,
2 the command was wrong, 130 interrupted.
"""

app = typer.Typer(
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.command("list")(list_rows)
for _verb in (show, run, results, race, report, doctor, transport, sharpness, certify):
    app.command()(_verb)


def main() -> None:
    """The entry point: no traceback reaches a user, unless VARAN_DEBUG is set."""
    try:
        app(prog_name="varan")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        if os.environ.get("VARAN_DEBUG"):
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            where = error.filename or "standard output"
            typer.echo(f"varan: {where}: {error.strerror}.", err=True)
            sys.exit(FAILED)
        typer.echo(f"varan: unexpected {type(error).__name__}: {error}", err=True)
        typer.echo("This is a bug; VARAN_DEBUG=1 shows where.", err=True)
        sys.exit(FAILED)
