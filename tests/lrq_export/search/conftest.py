"""Searches here take milliseconds: garbage collection at their end and the disk's flush of each value take longer."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def nothing_but_the_search():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lrq_export.progress.give_back", lambda: None)
        patch.setattr("os.fsync", lambda descriptor: None)
        yield
