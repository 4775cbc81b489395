"""With ``--dist loadgroup``, as ``make test`` runs them, the tests of a file are run by one process."""

import pytest


def test_pytest_xdist_finds_the_group_of_each_test(request: pytest.FixtureRequest) -> None:
    """It looks for it in the ids, after an "@"."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("needs --dist loadgroup")
    for item in request.session.items:
        mark = item.get_closest_marker("xdist_group")
        assert mark is not None
        assert item.nodeid.endswith(f"@{mark.args[0]}")
