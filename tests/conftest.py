"""One profile for all property tests: the same examples in every CI run, new ones in every nightly run."""

from __future__ import annotations

from hypothesis import settings
from tests.effort import EFFORT

settings.register_profile("quire", deadline=None, derandomize=EFFORT == 1)
settings.load_profile("quire")
