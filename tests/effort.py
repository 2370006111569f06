"""How hard property tests try: as written in CI, many times that and with fresh randomness in `make nightly`."""

from __future__ import annotations

import os

EFFORT = int(os.environ.get("QUIRE_TEST_EFFORT", "1"))
"""Factor on the number of examples. Above 1 the examples differ from run to run."""


def examples(count: int) -> int:
    """`count` examples, times the effort."""
    return count * EFFORT
