"""Every Python block of the documentation runs, and prints what stands below it."""

import pathlib
import re
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[2]
_PAGES = [_ROOT / "README.md", _ROOT / "docs" / "guide.md"]
_BLOCK = re.compile(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", re.DOTALL)


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.stem)
def test_python_blocks_run_and_print_what_the_page_shows(page):
    blocks = _BLOCK.findall(page.read_text())
    assert blocks
    mark = "--- end of block ---"
    program = "".join(f"{code}\nprint({mark!r})\n" for code, _ in blocks)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split(mark + "\n")
    for (_, shown), got in zip(blocks, printed, strict=False):
        if shown:
            assert _blur(got) == _blur(shown)


def _blur(text: str) -> str:
    """Residuals below a tolerance differ from machine to machine."""
    return re.sub(r"\d(\.\d+)?e-\d+", "tiny", text)
