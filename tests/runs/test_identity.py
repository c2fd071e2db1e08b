"""What a resumed run may change: `pytest tests/runs/test_identity.py`; with real runs in test_folder.py."""

from pathlib import Path

import pytest

from rlhf.runs.identity import check_same
from rlhf.user_error import UserError

STARTED = {"number of processes": 2, "rows a step": 8, "versions": {"torch": "2.13.0"}, "training rows": "0" * 64}


def test_processes_may_share_the_same_rows_otherwise_and_libraries_change():
    now = STARTED | {"number of processes": 1, "versions": {"torch": "2.14.0"}}
    assert check_same(Path("run"), STARTED, now) == [
        "torch was 2.13.0, is 2.14.0",
        "number of processes: 2, and now 1",
    ]
    assert not check_same(Path("run"), STARTED | {"debug": []}, STARTED)


def test_processes_with_other_rows_are_refused_by_name():
    with pytest.raises(UserError, match="number of processes: 2, and now 1; rows a step: 8, and now 4"):
        check_same(Path("run"), STARTED, STARTED | {"number of processes": 1, "rows a step": 4})
