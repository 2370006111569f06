"""Who a request is from, by its headers, the clock and the tenants of the moment."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

from quire.errors import PermissionDenied, Unauthenticated
from quire.router.access import Access, Caller, Visit
from quire_schemas.keys import Digest, new_key
from quire_schemas.wire import AccessKey, Tenant

KEY = new_key()
DIGEST = Digest.of(KEY)


class Wall:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def tenant(name: str = "team", **fields: Any) -> Tenant:
    return Tenant(name, (AccessKey("k", DIGEST.sha256, DIGEST.id),), **fields)


def scope(*headers: tuple[str, str], client: str = "127.0.0.1") -> dict[str, Any]:
    return {"headers": [(name.encode(), value.encode()) for name, value in headers], "client": (client, 1)}


BEARER = ("authorization", f"Bearer {KEY}")


def test_a_policy_ends_at_its_moment_by_the_wall_clock() -> None:
    wall = Wall()
    access = Access(clock=wall)
    access.act_by([tenant(expires_at=101.0)])
    for now, known in ((100.0, True), (100.999, True), (101.0, False), (1e9, False)):
        wall.now = now
        assert (access.visit(scope(BEARER)).caller is not None) is known
        assert (access.inside("team", "k", "chat").caller is not None) is known


def test_of_two_policies_with_one_key_the_first_has_it() -> None:
    access = Access()
    access.act_by([tenant("a"), tenant("b")])
    assert access.visit(scope(BEARER)).known.owner == "a"


def test_a_key_of_ours_is_known_by_its_digest_alone_as_well() -> None:
    access = Access()
    access.act_by([Tenant("team", (AccessKey("k", DIGEST.sha256),))])
    assert access.visit(scope(BEARER)).known.key == "k"
    assert access.visit(scope(("x-api-key", f"qk_{DIGEST.id}_" + "0" * 64))).caller is None


def test_an_id_of_a_key_opens_nothing_without_its_secret() -> None:
    access = Access()
    access.act_by([tenant()])
    for forged in (KEY[:-1] + ("0" if KEY[-1] != "0" else "1"), f"qk_{DIGEST.id}_" + "0" * 64, DIGEST.id):
        assert access.visit(scope(("authorization", f"Bearer {forged}"))).caller is None


def test_work_in_the_background_is_its_owners_as_he_is_now() -> None:
    access = Access()
    assert access.inside("", "", "chat").known == Caller()
    with pytest.raises(Unauthenticated):
        _ = access.inside("team", "k", "chat").known
    access.act_by([tenant(operations=("batches",))])
    with pytest.raises(Unauthenticated):
        _ = access.inside("", "", "chat").known
    with pytest.raises(PermissionDenied):
        _ = access.inside("team", "k", "chat").known
    access.act_by([tenant()])
    assert access.inside("team", "gone", "chat").known.key == "gone", "a key that was rotated away"


def test_who_has_no_policy_may_do_everything_until_others_can_reach_it() -> None:
    assert Access().visit(scope()).known == Caller()
    assert Access(closed=True).visit(scope()).caller is None
    assert Access(closed=True).inside("", "", "chat").caller is None


def test_operations() -> None:
    some, every = Caller(tenant(operations=("chat", "metrics"))), Caller(tenant())
    for operation in ("chat", "metrics", "any", "public"):
        some.check_operation(operation)
    for operation in ("embeddings", ""):
        with pytest.raises(PermissionDenied):
            some.check_operation(operation)
    every.check_operation("embeddings")
    for operation in ("metrics", ""):
        with pytest.raises(PermissionDenied):
            every.check_operation(operation)


def test_no_two_tenants_can_have_one_salt() -> None:
    salts = {
        Caller(tenant(name)).salted(salt) for name in ("a", "ab", "a.b") for salt in ("", "b", "ab", "\0", "a\0")
    }
    assert len(salts) == 15


def test_a_rank_can_be_lowered_by_a_request_and_is_the_policys_else() -> None:
    assert [Caller(tenant(priority=5)).rank(asked) for asked in (0, 2)] == [-5, -3]
    assert Caller(tenant(priority=-5)).rank(0) == 5
    assert Caller().rank(-3) == -3


@pytest.mark.parametrize(
    ("given", "local"),
    [
        (scope(("host", "localhost:8000")), True),
        (scope(("host", "127.0.0.1")), True),
        (scope(("host", "[::1]:8000"), client="::1"), True),
        (scope(("host", "llm.example.org")), False),
        (scope(("host", "localhost"), client="10.0.0.7"), False),
        (scope(("host", "localhost"), ("x-forwarded-for", "1.2.3.4")), False),
        (scope(("host", "localhost"), ("forwarded", "for=1.2.3.4")), False),
        (scope(("host", "localhost"), ("authorization", "Bearer wrong-wrong-wrong")), False),
    ],
)
def test_what_comes_from_this_machine(given: dict[str, Any], local: bool) -> None:
    access = Access(closed=True)
    visit: Visit = access.visit(given)
    assert visit.local is local
    without_client = access.visit({**given, "client": None})
    assert not without_client.local


def welch(ones: list[Callable[[], object]], others: list[Callable[[], object]], turns: int = 500) -> float:
    """Welch's t of how long things of two kinds take: of the means of each thing, since where something happens to
    lie in memory is a difference, too. All take turns in ever another order, and the slowest fifth of each, when
    the machine did something else, is left out."""
    things, times = [*ones, *others], [[0] * turns for _ in (*ones, *others)]
    order, shuffle = list(range(len(things))), random.Random(1).shuffle
    for turn in range(turns):
        shuffle(order)
        for at in order:
            begun = time.perf_counter_ns()
            things[at]()
            times[at][turn] = time.perf_counter_ns() - begun
    means = [statistics.fmean(sorted(each)[: turns * 4 // 5]) for each in times]
    kinds = means[: len(ones)], means[len(ones) :]
    spread = sum(statistics.variance(kind) / len(kind) for kind in kinds)
    return abs(statistics.fmean(kinds[0]) - statistics.fmean(kinds[1])) / math.sqrt(spread)


@pytest.mark.nightly
def test_how_long_a_refusal_takes_tells_nothing_of_the_key() -> None:
    """One wrong key is asked with, 20,000 times each where it is right but for its last sign, and where it is
    wrong from its first secret one on. The same measure finds a comparison that ends with the first difference."""
    start = KEY.rindex("_") + 1
    near = KEY[:-1] + ("0" if KEY[-1] != "0" else "1")
    far = KEY[:start] + "".join("0" if sign != "0" else "1" for sign in KEY[start:])
    asked = scope(BEARER)

    def refusing(key: str) -> Callable[[], object]:
        digest, access = Digest.of(key), Access()
        access.act_by([Tenant("team", (AccessKey("k", digest.sha256, digest.id),))])
        assert access.visit(asked).caller is None
        return lambda: access.visit(asked)

    def naive(key: str) -> Callable[[], object]:
        mine = "".join(key)
        return lambda: all(one == other for one, other in zip(mine, KEY, strict=True))

    found = sorted(
        welch([refusing(near) for _ in range(40)], [refusing(far) for _ in range(40)]) for _ in range(3)
    )
    assert found[1] < 4.5, found
    assert welch([naive(near) for _ in range(40)], [naive(far) for _ in range(40)]) > 4.5
