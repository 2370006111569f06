"""What is known of declared keys, and what is not handed down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quire_operators.access import amount, read
from quire_operators.records import StoredObject
from quire_operators.secrets import Secrets, without_tokens
from quire_operators.status import Reason
from quire_schemas import wire
from quire_schemas.keys import Digest, new_key
from quire_schemas.manifest import load

OURS, BROUGHT = new_key(), "a-string-of-the-users-own"


def stored(name: str, spec: str, deleting: float | None = None, created: float = 0.0) -> StoredObject:
    head = f"apiVersion: quire.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {{name: {name}}}\nspec: "
    (located,) = load([("p", head + spec)]).resources
    resolved: dict[str, Any] = located.resource.model_dump(mode="json", by_alias=True)["spec"]
    return StoredObject(located.key, name, 1, 1, {}, "", resolved, None, created, created, deleting)


def test_a_policy_as_the_router_is_told_of_it(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path, {"KEY": BROUGHT})
    spec = (
        f"{{keys: [{{name: a, hash: '{Digest.of(OURS)}'}}, {{name: b, valueFrom: {{env: KEY}}}}], "
        "allow: {models: [m], operations: [chat]}, priority: 3, expiresAt: '2027-01-01T01:00:00+01:00', "
        "limits: [{requests: 5, per: 1m30s}, {scope: policy, concurrency: 2}]}"
    )
    (policy,) = read([stored("team", spec)], secrets, 0.0)
    assert policy.tenant() == wire.Tenant(
        "team",
        (
            wire.AccessKey("a", Digest.of(OURS).sha256, Digest.of(OURS).id),
            wire.AccessKey("b", Digest.of(BROUGHT).sha256),
        ),
        ("m",),
        ("chat",),
        (wire.AccessLimit("key", requests=5, per=90_000), wire.AccessLimit("policy", concurrency=2)),
        3,
        1798761600.0,
    )
    assert BROUGHT not in repr(policy)


def test_what_is_wrong_with_a_key_is_told_without_its_value(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path, {"SHORT": "short-secret", "ODD": "with a blank " * 3, "GOOD": BROUGHT})
    names = ("SHORT", "ODD", "NONE", "GOOD", "GOOD2")
    keys = ", ".join(f"{{name: {name.lower()}, valueFrom: {{env: {name.rstrip('2')}}}}}" for name in names)
    (policy,) = read([stored("team", f"{{keys: [{keys}]}}")], secrets, 0.0)
    assert [key.reason for key in policy.keys] == [
        Reason.KEY_UNFIT, Reason.KEY_UNFIT, Reason.SECRET_NOT_FOUND, Reason.ENFORCED, Reason.KEY_TAKEN,
    ]  # fmt: skip
    assert [key.name for key in policy.usable] == ["good"]
    for value in secrets.environ.values():
        assert value not in repr(policy)


def test_a_key_is_that_of_the_oldest_policy_that_is_not_being_deleted(tmp_path: Path) -> None:
    secrets, one = Secrets(tmp_path, {}), f"{{keys: [{{name: a, hash: '{Digest.of(OURS)}'}}]}}"
    found = read([stored("z", one), stored("b", one), stored("a", one, deleting=1.0)], secrets, 0.0)
    assert [(policy.stored.key.name, len(policy.usable)) for policy in found] == [("b", 1), ("z", 0)]
    assert found[1].keys[0].problem == "it is that of accesspolicy/b key a, which is older"
    older = Digest.of(OURS)
    forms = (str(older), f"sha256:{older.sha256}", f"sha256:{older.id}:{'0' * 64}", "")
    specs = [f"{{keys: [{{name: a, {f'hash: {form!r}' if form else 'valueFrom: {env: K}'}}}]}}" for form in forms]
    secrets = Secrets(tmp_path, {"K": OURS})
    for newer in specs[1:]:
        red, green = read(
            [stored("green", newer, created=2.0), stored("red", specs[0], created=1.0)], secrets, 0.0
        )
        assert (red.stored.key.name, len(red.usable), len(green.usable)) == ("red", 1, 0)
        assert green.keys[0].reason is Reason.KEY_TAKEN
        assert green.keys[0].problem.endswith("that of accesspolicy/red key a, which is older")


def test_a_policy_that_has_expired_gives_its_key_up(tmp_path: Path) -> None:
    key = f"keys: [{{name: a, hash: '{Digest.of(OURS)}'}}]"
    first = stored("first", f"{{{key}, expiresAt: '1970-01-01T00:01:00Z'}}", created=1.0)
    second, secrets = stored("second", f"{{{key}}}", created=2.0), Secrets(tmp_path, {})
    for wall, has_it in ((59.0, "first"), (60.0, "second")):
        usable = [each.stored.key.name for each in read([first, second], secrets, wall) if each.usable]
        assert usable == [has_it]


def test_variables_with_keys_and_tokens_are_not_handed_down(tmp_path: Path) -> None:
    spec = stored("p", "{keys: [{name: a, valueFrom: {env: KEY}}, {name: b, valueFrom: {secretRef: s}}]}").resolved
    model = {"sourceAuth": {"env": "TOKEN", "file": None}}
    environ = {"KEY": "k", "TOKEN": "t", "PATH": "p"}
    assert without_tokens(environ, [spec, model, {"sourceAuth": None}, {}]) == {"PATH": "p"}


def test_budgets_as_the_router_is_told_of_them(tmp_path: Path) -> None:
    spec = (
        "{keys: [], budgets: [{name: m, cost: '250.0001', per: month}, "
        "{name: d, scope: key, tokens: 9, counts: prompt, cached: free, per: 1d1h, warnAt: 87.5%}]}"
    )
    (policy,) = read([stored("team", spec)], Secrets(tmp_path, {}), 0.0)
    assert policy.budgets() == (
        wire.AccessBudget("team", "m", "policy", "month", cost=250_0001_000_000),
        wire.AccessBudget("team", "d", "key", 25, 9, "prompt", "free", warn_at=8750),
    )
    older = stored("team", "{keys: []}")
    del older.resolved["budgets"]
    assert read([older], Secrets(tmp_path, {}), 0.0)[0].budgets() == ()


@pytest.mark.parametrize(
    ("ticks", "text"),
    [
        (0, "0.0000"),
        (1, "0.0001"),
        (10**10, "1.0000"),
        (10**10 + 10**6, "1.0001"),
        (25 * 10**21, "2500000000000.0000"),
    ],
)
def test_money_is_shown_without_floats_and_never_as_less_than_it_is(ticks: int, text: str) -> None:
    assert amount("cost", ticks) == text
    assert amount("tokens", ticks) == ticks
