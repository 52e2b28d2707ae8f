"""What the tests of the core share."""

from __future__ import annotations

import pytest

from tests.core.toys import CALLS


@pytest.fixture(autouse=True)
def no_calls() -> None:
    """The toys count their work from zero in every test."""
    CALLS.clear()
