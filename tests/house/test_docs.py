"""What the documentation shows is true: its code runs, its commands exist."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import typer
from _source import ROOT

from varan.cli import app

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md")),
]
_BLOCK = re.compile(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", re.DOTALL)
_SHELL = re.compile(r"```sh\n(.*?)```", re.DOTALL)

# One process runs many pages, each from a clean slate: starting JAX costs more than
# most pages do. It reads the pages' blocks and writes what each printed.
_RUN = """
import contextlib, io, json, sys, traceback
import jax

def run(blocks):
    jax.config.update("jax_enable_x64", False)
    names, printed = {"__name__": "__main__"}, []
    for block in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(block, names)
        printed.append(out.getvalue())
    return printed

results = {}
for page, blocks in json.load(sys.stdin).items():
    try:
        results[page] = run(blocks)
    except BaseException:
        results[page] = traceback.format_exc()
print(json.dumps(results))
"""
# Compiling is most of the work; how fast the code then is, is nothing to these pages.
_COMPILE = "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0"


def _group(double):
    """The pages with code in one precision."""
    return {
        str(page.relative_to(ROOT)): _BLOCK.findall(text)
        for page in PAGES
        if _BLOCK.search(text := page.read_text(encoding="utf-8"))
        and ("jax_enable_x64" in text) == double
    }


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_python_blocks_run_and_print_what_the_page_shows(double, monkeypatch):
    pages = _group(double)
    assert len(pages) > 5
    monkeypatch.setenv("XLA_FLAGS", _COMPILE)
    done = subprocess.run(
        [sys.executable, "-c", _RUN],
        input=json.dumps(
            {name: [c for c, _ in found] for name, found in pages.items()}
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    wrong = []
    for name, printed in json.loads(done.stdout).items():
        if isinstance(printed, str):
            wrong.append(f"{name}: {printed}")
            continue
        for (code, shown), got in zip(pages[name], printed, strict=True):
            if _blur(got) != _blur(shown):
                wrong.append(f"{name}, after\n{code}shown:\n{shown}printed:\n{got}")
    assert not wrong, "\n\n".join(wrong)


def _blur(text):
    """Residuals below a tolerance differ from machine to machine."""
    return re.sub(r"\d(\.\d+)?e-\d+", "tiny", text)


def commands():
    """Every `varan ...` on a page: the page, the line, whether it is to be typed."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in _SHELL.findall(text) for line in block.splitlines()]
        lines += re.findall(r"^    (varan .*)$", text, re.M)
        for line in lines:
            typed = re.sub(r"\s+#.*", "", line).removeprefix(".venv/bin/")
            if typed.startswith("varan "):
                yield page.name, typed, True
        for typed in re.findall(r"`(varan [a-z][^`\n]*)`", text):
            yield page.name, typed, False


@pytest.mark.parametrize(("page", "line", "whole"), sorted(set(commands())))
def test_commands_exist_with_their_options(page, line, whole):
    verb, *arguments = shlex.split(line.removeprefix("varan "))
    verbs = typer.main.get_command(app).commands
    assert verb in verbs, f"{page}: there is no `varan {verb}`"
    try:
        # Parses and runs nothing.
        verbs[verb].make_context(verb, arguments)
    except typer.Exit:
        pass
    except Exception as error:
        # In running text a command may stand without its row.
        if whole or not str(error).startswith("Missing"):
            raise AssertionError(f"{page}: {line}: {error}") from error


def test_make_targets_exist():
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", rules, re.M))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        shown = set(re.findall(r"(?:^|`)make ([a-z]+)\b", text, re.M))
        assert shown <= targets, f"{page.name}: make {sorted(shown - targets)}"


def test_options_that_do_not_exist_are_found():
    with pytest.raises(AssertionError, match="README"):
        test_commands_exist_with_their_options("README.md", "varan run --al", True)
    with pytest.raises(AssertionError, match="README"):
        test_commands_exist_with_their_options("README.md", "varan rnu", True)
    with pytest.raises(AssertionError, match="README"):
        test_commands_exist_with_their_options("README.md", "varan show", True)
