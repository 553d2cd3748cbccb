"""`varan run` as a process, on a toy row whose second seed hangs: to be interrupted."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

# Tests that are run in the background of a shell inherit that Ctrl-C is ignored.
_COMMAND = """
    import signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path.insert(0, {tests!r})
    from conftest import make_row
    from varan import cli
    from varan.lab import catalogue
    rows = (make_row("hangs", seeds=3, exclusive={exclusive!r}),)
    catalogue.load = lambda: catalogue.Catalogue(rows)
    cli.main()
"""


def hanging_run(folder, *options, exclusive=False):
    """Starts it, one worker at a time, with its results in a folder."""
    script = folder / "script.py"
    tests = str(Path(__file__).parent / "lab")
    text = _COMMAND.format(tests=tests, exclusive=exclusive)
    script.write_text(textwrap.dedent(text))
    options = ["--jobs", "1", "--out", str(folder), *options]
    return subprocess.Popen(
        [sys.executable, str(script), "run", "--all", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition):
    """What the condition gives, once it gives something."""
    for _ in range(1200):
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not come to pass within a minute")
