from __future__ import annotations

import pytest

from tests.serve.models import threads


@pytest.fixture(autouse=True)
def no_threads_left():
    before = threads()
    yield
    for thread in threads() - before:
        thread.join(10)
        assert not thread.is_alive(), f"{thread.name} is still there"
