"""What no file may contain."""

import re
import subprocess

from _source import ROOT

# A path of somebody's machine: it works nowhere else.
_MACHINE = re.compile(r"(?<![\w.~$}/-])/(?:work|tmp|home|root|Users|opt|mnt)/\w")
_TEXT = {".py", ".md", ".toml", ".lock", ".txt", ".yml", ".yaml", ".sh", ""}


def _tracked():
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True
    )
    if listed.returncode:  # a source archive instead of a checkout
        return [file for file in (ROOT / "src").rglob("*") if file.is_file()]
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [file for file in files if file.is_file()]


def test_no_file_names_a_path_of_one_machine():
    wrong = []
    for file in _tracked():
        if file.suffix in _TEXT:
            text = file.read_text(encoding="utf-8")
            wrong += [f"{file.name}: {m.group()}" for m in _MACHINE.finditer(text)]
    assert not wrong, wrong
