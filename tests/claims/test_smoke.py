"""Every built row runs at smoke scale, through the real runner."""

import pytest

from varan.lab import results
from varan.lab.catalogue import load
from varan.lab.runner import run
from varan.lab.store import Store

# A smoke run is meant to take 5 s on a quiet core; a busy or slow one needs a few times
# as much. Beyond this the row has outgrown its scale.
CPU_LIMIT_S = 40.0

BUILT = load().select(state="built")


@pytest.mark.parametrize("row", BUILT, ids=lambda row: row.id)
def test_smoke(row, tmp_path):
    with Store(tmp_path) as store:
        runs = run([row], "smoke", store)
    (result,) = results.conclude(runs, tmp_path / "plots")
    messages = [f"{record.message}\n{record.detail}" for record in runs[0].failures]
    assert not messages, "\n".join(messages)
    assert result.verdict is not None
    assert runs[0].measured[0].cpu_s < CPU_LIMIT_S
    for path in result.plots:
        assert path.stat().st_size > 0
