"""One profile for all property tests: the same examples in every CI run, new ones in every nightly run.

Ctrl-C is part of what is tested. A shell without job control starts what it puts in the background with SIGINT
ignored, and every child would inherit that: it is taken back here, for the tests and all they start.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings
from tests.effort import EFFORT
from tests.postgres import Postgres

settings.register_profile("quire", deadline=None, derandomize=EFFORT == 1)
settings.load_profile("quire")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server for all tests of a process; without Debian's package they are skipped."""
    server = Postgres()
    yield server
    server.close()
