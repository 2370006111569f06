"""Which families of calls the server has not got yet: their tests are skipped, and no other place says so.

To let the tests of a family run, take its line out of `PENDING`. A test fails when a family is there and its line
still is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import pytest

from quire.router.openapi import ENDPOINTS


def _has_path(path: str) -> Callable[[], bool]:
    return lambda: any(each.path == path for each in ENDPOINTS)


PENDING: Final[Mapping[str, Callable[[], bool]]] = {
    "responses": _has_path("/v1/responses"),
}
"""The families that are not served yet, and how to see that they are."""


def needs(*families: str) -> pytest.MarkDecorator:
    """For a test of these families."""
    lacking = sorted(set(families) & set(PENDING))
    return pytest.mark.skipif(bool(lacking), reason=f"not served yet: {', '.join(lacking)}")
