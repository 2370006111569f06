"""The one place where families of calls are marked as not served yet is honest."""

from __future__ import annotations

import pytest
from tests.clients.features import PENDING


@pytest.mark.parametrize("family", sorted(PENDING))
def test_a_family_that_is_served_is_tested(family: str) -> None:
    assert not PENDING[family](), f"take {family!r} out of PENDING in tests/clients/features.py"
