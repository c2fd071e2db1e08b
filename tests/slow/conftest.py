"""What the slow tests share."""

import time

import pytest


@pytest.fixture(scope="module")
def one_thread(request):
    """The forkserver CONTEXT of a test's file, on one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # read by the process that is forked, which this starts
        request.module.CONTEXT.Process(target=time.sleep, args=(0,)).start()
        yield
