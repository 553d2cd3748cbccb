"""Tables for other programs: every number, and a file whole or not at all."""

import csv
import io
import os
from pathlib import Path

import pytest

from varan.lab.export import COLUMNS, to_csv, write_whole
from varan.lab.store import Record
from varan.lab.stored import StoredRow


def stored(row, numbers):
    records = {
        seed: Record(
            row.id,
            "laptop",
            seed,
            "measured",
            {},
            {"commit": "abc", "versions": {"jax": "1"}, "machine": {"processor": "P"}},
            numbers=each,
            wall_s=1.5,
        )
        for seed, each in enumerate(numbers)
    }
    return StoredRow(row.id, row, "laptop", records, {}, None, None, False)


def test_one_line_a_number(toys):
    rows = [stored(toys(), [{"a": 0.1, "b": float("inf")}, {"a": 1e-300}])]
    lines = list(csv.DictReader(io.StringIO(to_csv(rows))))
    numbers = [(line["seed"], line["quantity"], float(line["value"])) for line in lines]
    assert numbers == [("0", "a", 0.1), ("0", "b", float("inf")), ("1", "a", 1e-300)]
    assert list(lines[0]) == list(COLUMNS)
    assert (lines[0]["topic"], lines[0]["processor"]) == ("toys", "P")
    assert (lines[0]["wall_s"], lines[0]["compile_s"]) == ("1.5", "")


def test_a_file_is_replaced_whole_and_keeps_its_permissions(tmp_path):
    file, link = tmp_path / "table.csv", tmp_path / "link.csv"
    write_whole(file, "old")
    file.chmod(0o640)
    link.symlink_to(file)
    write_whole(link, "new")
    assert file.read_text() == "new" and link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o640
    assert len(list(tmp_path.iterdir())) == 2


def test_what_was_there_stays_when_writing_fails(tmp_path, monkeypatch):
    file = tmp_path / "table.csv"
    write_whole(file, "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
def test_a_device_is_written_and_not_replaced():
    with pytest.raises(OSError, match="No space left"):
        write_whole(Path("/dev/full"), "text")
    assert Path("/dev/full").is_char_device()
