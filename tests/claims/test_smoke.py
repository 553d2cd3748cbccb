"""Every built row runs at smoke scale, through the real runner."""

import pytest

from varan.lab import results
from varan.lab.catalogue import load
from varan.lab.runner import run
from varan.lab.store import Store

BUILT = load().select(state="built")


@pytest.mark.parametrize("row", BUILT, ids=lambda row: row.id)
def test_smoke(row, tmp_path):
    with Store(tmp_path) as store:
        runs = run([row], "smoke", store)
    (result,) = results.conclude(runs, tmp_path / "plots")
    messages = [f"{record.message}\n{record.detail}" for record in runs[0].failures]
    assert not messages, "\n".join(messages)
    assert result.verdict is not None
    for path in result.plots:
        assert path.stat().st_size > 0
