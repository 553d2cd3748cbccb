"""What a test meets whose service is absent."""

import pytest

from _services import require


def test_an_absent_service_is_skipped_by_name_or_fails_where_it_must_be_there(
    monkeypatch,
):
    assert require("found", "A service") == "found"
    monkeypatch.delenv("VARAN_REQUIRE_SERVICES", raising=False)
    with pytest.raises(pytest.skip.Exception, match="A service is not installed"):
        require(None, "A service")
    monkeypatch.setenv("VARAN_REQUIRE_SERVICES", "1")
    with pytest.raises(pytest.fail.Exception, match="scripts/services does it"):
        require(None, "A service")
