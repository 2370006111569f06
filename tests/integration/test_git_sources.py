"""Git sources by the pass: real git over a real socket, the real store and admission, and a clock that is
moved."""

from __future__ import annotations

import hmac
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ConfigDict, TypeAdapter
from tests.integration.git_remote import ENVIRONMENT, Remote, git
from tests.integration.plane import Plane
from tests.integration.test_gitops import route, source
from typing_extensions import is_typeddict

from quire import builtin
from quire.cli import shapes
from quire.controlplane.errors import ApiError
from quire.controlplane.following import Following
from quire.controlplane.intents import Intents
from quire.controlplane.plane import ControlPlane
from quire.controlplane.views import Views
from quire_operators.git import Limits
from quire_operators.gitops import SourceReconciler
from quire_operators.overrides import Kind, Override
from quire_operators.paths import StateDir
from quire_schemas.resource import Key

PROD = Key("gitsource", "prod")


@dataclass
class Desk:
    """A control plane whose queue does not run: `step` is one pass over a source."""

    plane: ControlPlane
    intents: Intents
    following: Following
    views: Views
    clock: Any
    sources: SourceReconciler = field(init=False)
    limits: Limits | None = None
    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    wall: float = 1_800_000_000.0

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """As after a restart: nothing is in memory."""
        self.sources = SourceReconciler(
            self.plane.store,
            self.plane.secrets,
            self.plane.state.git,
            self.environ,
            self.clock,
            wall=lambda: self.wall,
            rng=random.Random(7),
            limits=self.limits,
        )
        self.sources.hands = self.intents
        self.plane.sources = self.sources

    async def apply(self, *texts: str, **more: Any) -> None:
        files = [{"name": f"{n}.yaml", "text": text} for n, text in enumerate(texts)]
        await self.intents.apply({"files": files, **more})

    async def step(self, seconds: float = 0.0, name: str = "prod") -> float | None:
        self.clock.now += seconds
        return await self.sources.reconcile(Key("gitsource", name))

    async def sync(self) -> None:
        """Look now, whatever the clock says."""
        self.following.decide(PROD, "sync", {})
        await self.step()

    def view(self, name: str = "prod") -> dict[str, Any]:
        stored = self.plane.store.get(Key("gitsource", name))
        assert stored is not None
        return self.views.of(stored)

    def status(self, name: str = "prod") -> dict[str, Any]:
        return dict(self.view(name)["status"])

    def condition(self, type_: str, name: str = "prod") -> tuple[str, str]:
        found = next(each for each in self.status(name)["conditions"] if each["type"] == type_)
        return found["status"], found["reason"]

    def message(self, type_: str = "Ready", name: str = "prod") -> str:
        return str(next(each for each in self.status(name)["conditions"] if each["type"] == type_)["message"])

    def names(self, kind: str = "route") -> list[str]:
        return [each.key.name for each in self.plane.store.objects(kind) if each.deletion_time is None]

    def gone(self, *names: str) -> None:
        """The objects that are being deleted are gone by now."""
        for name in names:
            self.plane.store.remove(Key("route", name))


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def exact(shape: type, answer: dict[str, Any]) -> None:
    """The answer has the fields of the shape that is documented, and no other."""
    for each in vars(shapes).values():
        if is_typeddict(each):
            each.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    TypeAdapter(shape).validate_python(answer)


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    remote = Remote(tmp_path / "remote")
    yield remote
    remote.close()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    state = StateDir(tmp_path / "state")
    state.create()
    plane = ControlPlane(state, {"tiny": builtin.path("tiny")})
    views = Views(plane)
    yield Desk(plane, Intents(plane, views), Following(plane, views), views, Clock())
    plane.store.close()


async def begun(desk: Desk, remote: Remote, more: str = "", **files: str) -> str:
    """A source at its first commit."""
    remote.write(**files)
    commit = remote.push("first")
    await desk.apply(source(remote, more=more))
    await desk.step()
    assert desk.condition("Ready") == ("True", "Synced"), desk.status()
    assert desk.status()["lastAppliedRevision"] == commit
    return commit


PRUNE = ", sync: {prune: true}"
HEAL = ", sync: {selfHeal: true}"


async def test_what_left_the_repository_is_deleted_within_the_cap(desk: Desk, remote: Remote) -> None:
    await begun(desk, remote, PRUNE, a=route("a"), b=route("b"), c=route("c"), d=route("d"))
    (remote.work / "a.yaml").unlink()
    remote.push("without a")
    await desk.sync()
    assert desk.names() == ["b", "c", "d"]
    assert desk.status()["history"][0]["changed"] == ["route/a deleted"]
    desk.gone("a")
    for name in "bc":
        (remote.work / f"{name}.yaml").unlink()
    remote.write(e=route("e"))
    most = remote.push("without most")
    await desk.sync()
    assert desk.names() == ["b", "c", "d", "e"], "the rest of the commit is applied"
    assert desk.condition("Drifted") == ("True", "PruneBlocked")
    assert desk.status()["kept"] == ["route/c", "route/b"]
    assert desk.status()["lastAppliedRevision"] == most
    assert "2 of 3 objects left the repository" in desk.message("Drifted")
    exact(shapes.Object, {**desk.view(), "apiVersion": "quire.dev/v1alpha1"})
    await desk.step(40)
    assert desk.names() == ["b", "c", "d", "e"], "not piece by piece either"
    remote.write(f="nonsense")
    remote.push("refused")
    await desk.sync()
    git(remote.work, "reset", "--quiet", "--hard", most)
    git(remote.work, "push", "--quiet", "--force", "origin", "HEAD:main")
    await desk.sync()
    assert desk.names() == ["b", "c", "d", "e"], "nor by a detour over another commit"
    desk.intents.delete(Key("route", "b"))  # what is kept is nobody's to restore
    with pytest.raises(ApiError):
        desk.intents.delete(Key("route", "d"))
    desk.gone("b")
    await desk.sync()
    assert desk.names() == ["d", "e"]
    assert desk.condition("Drifted") == ("False", "InStep")


@pytest.mark.nightly
async def test_objects_of_others_are_never_deleted(desk: Desk, remote: Remote) -> None:
    await desk.apply(route("mine"))
    await begun(desk, remote, ", sync: {prune: true, maxPrune: 100%, allowEmpty: true}", a=route("a"))
    (remote.work / "a.yaml").unlink()
    remote.push("nothing")
    await desk.sync()
    assert desk.names() == ["mine"]


async def test_a_commit_without_manifests_or_without_the_folder_deletes_nothing(
    desk: Desk, remote: Remote
) -> None:
    first = await begun(
        desk, remote, ", path: deep/er, sync: {prune: true, maxPrune: 100%}", deep__er__a=route("a")
    )
    (remote.work / "deep/er/a.yaml").rename(remote.work / "deep/a.yaml")
    remote.push("moved")
    await desk.sync()
    assert desk.condition("Ready") == ("False", "PathNotFound")
    (remote.work / "deep/er/README").write_text("nothing here")
    remote.push("empty")
    await desk.sync()
    assert desk.condition("Ready") == ("False", "NoManifests")
    (remote.work / "deep/er/README").unlink()
    (remote.work / "deep/er").rmdir()
    (remote.work / "deep/er").write_text("a file")
    remote.push("a file in its place")
    await desk.sync()
    assert (desk.condition("Ready"), desk.condition("Stalled")) == (
        ("False", "PathNotFound"), ("True", "PathNotFound"),
    )  # fmt: skip
    assert desk.names() == ["a"]
    assert desk.status()["lastAppliedRevision"] == first


async def test_a_hand_is_refused_and_what_it_takes_is_told_or_undone(desk: Desk, remote: Remote) -> None:
    await begun(desk, remote, a=route("a"), b=route("b"))
    with pytest.raises(ApiError) as caught:
        await desk.apply(route("a", "other"))
    assert caught.value.body["error"]["code"] == "managed"
    await desk.apply(route("a"))  # the same again is no change
    await desk.apply(route("a", "other"), takeOwnership=True)
    desk.intents.delete(Key("route", "b"), take=True)
    desk.gone("b")
    await desk.step(2)
    assert desk.condition("Drifted") == ("True", "ManualChange")
    assert desk.message("Drifted") == "route/a: it was changed, route/b: it was deleted"
    assert desk.condition("Ready") == ("True", "Synced")
    remote.write(c=route("c"))
    remote.push("about something else")
    await desk.step(2)
    assert desk.names() == ["a", "c"]
    stored = desk.plane.store.get(Key("route", "a"))
    assert stored is not None
    assert stored.resolved["match"]["modelNames"] == ["other"], "another commit does not take it back"
    await desk.apply(source(remote, more=HEAL))
    await desk.step(2)
    assert desk.names() == ["a", "b", "c"]
    stored = desk.plane.store.get(Key("route", "a"))
    assert stored is not None
    assert stored.resolved["match"]["modelNames"] == ["a-name"]
    assert desk.condition("Drifted") == ("False", "InStep")
    assert desk.status()["history"][0]["result"] == "Healed"


@pytest.mark.nightly
async def test_git_says_something_new_of_what_a_hand_took(desk: Desk, remote: Remote) -> None:
    await begun(desk, remote, a=route("a"))
    await desk.apply(route("a", "by-hand"), takeOwnership=True)
    remote.write(a=route("a", "by-git"))
    remote.push("new")
    await desk.step(2)
    stored = desk.plane.store.get(Key("route", "a"))
    assert stored is not None
    assert stored.resolved["match"]["modelNames"] == ["by-git"]
    await desk.apply(route("a", "again"), takeOwnership=True)
    await desk.sync()
    stored = desk.plane.store.get(Key("route", "a"))
    assert stored is not None
    assert stored.resolved["match"]["modelNames"] == ["by-git"], "platform source sync puts all as it is in git"


@pytest.mark.nightly
async def test_history_that_is_rewritten_is_followed(desk: Desk, remote: Remote) -> None:
    first = await begun(desk, remote, PRUNE, a=route("a"), b=route("b"), c=route("c"))
    remote.write(a=route("a", "two"))
    second = remote.push("second")
    await desk.step(2)
    git(remote.work, "reset", "--quiet", "--hard", first)
    (remote.work / "c.yaml").unlink()
    forced = remote.push("another second")
    await desk.step(2)
    assert desk.status()["lastAppliedRevision"] == forced
    assert desk.names() == ["a", "b"]
    assert second in [entry["commit"] for entry in desk.status()["history"]]


async def test_two_sources_never_share_an_object(desk: Desk, remote: Remote, tmp_path: Path) -> None:
    await begun(desk, remote, a=route("a"))
    other = Remote(tmp_path / "other")
    try:
        other.write(x__a=route("a", "theirs"), x__b=route("b"))
        other.push("ours")
        await desk.apply(source(other, "second", HEAL))
        await desk.step(name="second")
        assert desk.condition("Ready", "second") == ("False", "ValidationFailed")
        assert (
            desk.message(name="second") == "x/a.yaml:3:18: metadata.name: route/a is an object of gitsource/prod"
        )
        assert desk.names() == ["a"]
        desk.plane.store.mark_deleting(PROD)
        await desk.step()
        await desk.step(31, name="second")
        assert desk.condition("Ready", "second") == ("True", "Synced")
        assert desk.names() == ["a", "b"]
    finally:
        other.close()


async def test_a_commit_waits_for_the_health_of_no_other(desk: Desk, remote: Remote) -> None:
    await begun(desk, remote, a=route("a"))
    assert desk.condition("AppliedHealthy") == ("False", "Unhealthy")
    assert desk.status()["summary"].endswith("; Unhealthy"), "a list of sources shows it"
    remote.write(a=route("a", "mended"))
    second = remote.push("the mend")
    await desk.step(2)
    assert desk.status()["lastAppliedRevision"] == second
    assert desk.condition("AppliedHealthy") == ("False", "Unhealthy")


async def test_what_is_scaled_paused_or_undone_is_no_change_by_hand(desk: Desk, remote: Remote) -> None:
    await begun(desk, remote, HEAL, m=MODEL)
    stored = desk.plane.store.get(Key("model", "m"))
    assert stored is not None
    for kind in (Kind.SCALE, Kind.AUTOSCALE, Kind.PAUSE, Kind.HOLD, Kind.PIN):
        desk.plane.store.set_override(stored.uid, Override(kind, "ada", desk.clock.now, "", replicas=3))
    kept = desk.plane.store.overrides(stored.uid)
    remote.write(r=route("r"))
    remote.push("about something else")
    await desk.step(2)
    await desk.sync()
    assert desk.names() == ["r"]
    assert desk.condition("Drifted") == ("False", "InStep")
    assert desk.plane.store.overrides(stored.uid) == kept
    assert desk.plane.store.get(Key("model", "m")) == stored
    assert [entry["result"] for entry in desk.status()["history"]] == ["Applied", "Applied"]


@pytest.mark.nightly
async def test_ten_commits_are_remembered(desk: Desk, remote: Remote) -> None:
    await begun(desk, remote, a=route("a"))
    for number in range(11):
        remote.write(a=route("a", f"name-{number}"))
        newest = remote.push(f"number {number}")
        await desk.step(2)
    subjects = [entry["subject"] for entry in desk.status()["history"]]
    assert subjects == [f"number {number}" for number in range(10, 0, -1)]
    assert desk.status()["lastAppliedRevision"] == newest


@pytest.mark.nightly
@pytest.mark.parametrize(("prune", "heal"), [(False, True), (True, False)])
async def test_pruning_and_healing_are_apart(desk: Desk, remote: Remote, prune: bool, heal: bool) -> None:
    flags = f", sync: {{prune: {str(prune).lower()}, selfHeal: {str(heal).lower()}}}"
    await begun(desk, remote, flags, a=route("a"), b=route("b"), c=route("c"))
    await desk.apply(route("b", "by-hand"), takeOwnership=True)
    (remote.work / "a.yaml").unlink()
    remote.push("without a")
    await desk.step(2)
    assert desk.names() == (["b", "c"] if prune else ["a", "b", "c"])
    stored = desk.plane.store.get(Key("route", "b"))
    assert stored is not None
    assert stored.resolved["match"]["modelNames"] == ["b-name" if heal else "by-hand"]


DELETE = ", sync: {prune: true}, deletionPolicy: Delete"


async def test_a_source_that_deletes_takes_its_objects_along_and_goes_last(desk: Desk, remote: Remote) -> None:
    await desk.apply(route("mine"))
    await begun(desk, remote, DELETE, a=route("a"), b=route("b"), c=route("c"))
    await desk.apply(route("b", "by-hand"), takeOwnership=True)
    with pytest.raises(ApiError) as caught:
        desk.intents.delete(PROD)
    said = caught.value.body["error"]
    assert (said["code"], said["exitCode"]) == ("prune_blocked", 5)
    assert said["message"] == (
        "gitsource/prod has spec.deletionPolicy: Delete: 2 of its 3 objects would be deleted with it, and "
        "spec.sync.maxPrune lets 50% be deleted at once: route/c, route/a"
    )
    assert "--prune" in said["hint"]
    await desk.step()
    assert desk.names() == ["a", "b", "c", "mine"], "nothing was begun"
    assert desk.condition("Ready") == ("True", "Synced")

    answer = desk.intents.delete(PROD, prune=True)
    assert answer["objects"] == {
        "deleted": ["route/c", "route/a"], "stay": {"route/b": "it was changed by hand"},
    }  # fmt: skip
    again = await desk.step()
    assert again is not None
    assert again <= 1
    assert desk.names() == ["b", "mine"]
    assert desk.view()["deleting"]
    assert desk.status()["summary"] == "Deleting: route/c, route/a: being deleted"
    assert desk.condition("Ready") == ("False", "Deleting")
    exact(shapes.Object, {**desk.view(), "apiVersion": "quire.dev/v1alpha1"})
    desk.intents.delete(Key("route", "b"))  # it is nobody's by now
    desk.gone("b", "c")
    desk.begin()  # the control plane was killed
    assert await desk.step(again) is not None
    assert desk.status()["summary"] == "Deleting: route/a: being deleted"
    desk.gone("a")
    await desk.apply(route("a"), route("c"))  # somebody else's of the same names, and the same manifests
    desk.intents.delete(Key("route", "c"))  # and nothing that the source waits for
    assert await desk.step(again) is None
    assert desk.plane.store.get(PROD) is None
    assert desk.names() == ["a", "mine"]
    assert not list(desk.plane.state.git.iterdir())
    assert [each.message for each in desk.plane.store.events(PROD) if each.reason == "Orphaned"] == [
        "these stay, and are nobody's: route/b: it was changed by hand"
    ]


async def test_the_objects_of_a_source_stay_unless_it_says_otherwise(desk: Desk, remote: Remote) -> None:
    await begun(desk, remote, ", sync: {maxPrune: 100%}", a=route("a"))
    assert desk.intents.delete(PROD)["objects"] == {
        "deleted": [], "stay": {"route/a": "spec.deletionPolicy is Orphan"},
    }  # fmt: skip
    assert await desk.step() is None
    assert desk.names() == ["a"]
    await desk.apply(route("a", "anybody-s"))
    await desk.apply(source(remote, more=", sync: {maxPrune: 100%}, deletionPolicy: Delete"))
    await desk.step()
    desk.intents.delete(PROD)  # 100%: nothing more is to be said
    await desk.step()
    assert desk.names() == []


async def test_a_source_that_is_deleted_while_the_platform_is_down_is_gone_at_once(
    desk: Desk, remote: Remote
) -> None:
    await begun(desk, remote, DELETE, a=route("a"), b=route("b"))
    await desk.apply(route("b", "by-hand"), takeOwnership=True)
    desk.plane.is_down = True  # as after `platform down`
    desk.intents.delete(PROD, prune=True)
    assert [str(each.key) for each in desk.plane.store.objects()] == ["route/b"]
    assert not list(desk.plane.state.git.iterdir())


@pytest.mark.nightly
async def test_a_remote_that_is_away_for_an_hour(desk: Desk, remote: Remote) -> None:
    first = await begun(desk, remote, HEAL, a=route("a"))
    remote.write(a=route("a", "new"))
    newest = remote.push("while it was away")
    remote.answers, asked = False, len(remote.requests)
    end = desk.clock.now + 3600
    while desk.clock.now < end:
        await desk.step(30)
    assert 12 <= len(remote.requests) - asked <= 20, "doubling pauses, up to 5 minutes"
    assert desk.condition("Fetched") == ("False", "RemoteUnreachable")
    assert desk.condition("Ready") == ("True", "Synced")
    assert desk.condition("Stalled")[0] == "False"
    assert desk.status()["lastAppliedRevision"] == first
    await desk.apply(route("a", "by-hand"), takeOwnership=True)
    await desk.step()
    stored = desk.plane.store.get(Key("route", "a"))
    assert stored is not None
    assert stored.resolved["match"]["modelNames"] == ["a-name"], "it heals without the remote"
    remote.answers = True
    await desk.step(310)
    assert desk.status()["lastAppliedRevision"] == newest
    assert desk.condition("Fetched") == ("True", "Verified")


@pytest.mark.nightly
async def test_after_a_restart_it_heals_from_its_clone_and_without_one_it_waits(
    desk: Desk, remote: Remote
) -> None:
    await begun(desk, remote, HEAL, a=route("a"))
    remote.answers = False
    await desk.apply(route("a", "by-hand"), takeOwnership=True)
    desk.begin()
    await desk.step()
    stored = desk.plane.store.get(Key("route", "a"))
    assert stored is not None
    assert stored.resolved["match"]["modelNames"] == ["a-name"]
    subprocess.run(["rm", "-rf", str(desk.plane.state.git)], check=True)
    desk.begin()
    await desk.step()
    assert desk.condition("Ready") == ("True", "Synced")
    assert desk.condition("Fetched") == ("False", "RemoteUnreachable")
    remote.answers = True
    await desk.step(40)
    assert desk.condition("Fetched") == ("True", "Verified")


async def test_a_suspended_source_does_nothing_until_it_is_resumed(desk: Desk, remote: Remote) -> None:
    await begun(desk, remote, HEAL, a=route("a"))
    desk.following.decide(PROD, "suspend", {"by": "ada", "reason": "a fire"})
    await desk.step()
    exact(shapes.Object, {**desk.view(), "apiVersion": "quire.dev/v1alpha1"})
    asked = len(remote.requests)
    remote.write(b=route("b"))
    remote.push("not now")
    await desk.apply(route("a", "by-hand"), takeOwnership=True)
    assert await desk.step(100) is None
    assert len(remote.requests) == asked
    assert desk.condition("Ready") == ("False", "Suspended")
    assert desk.names() == ["a"]
    with pytest.raises(ApiError):
        desk.following.decide(PROD, "sync", {})
    await desk.apply(source(remote, more=HEAL))  # no apply ends it
    assert await desk.step(100) is None
    desk.following.decide(PROD, "resume", {})
    await desk.step(100)
    assert desk.names() == ["a", "b"]
    await desk.apply(source(remote, more=", suspend: true"))
    assert await desk.step(100) is None
    assert desk.condition("Ready") == ("False", "Suspended")


@pytest.mark.nightly
async def test_a_window_lets_a_commit_wait_and_guards_the_last_one(desk: Desk, remote: Remote) -> None:
    windows = "windows: [{kind: Deny, schedule: '0 0 * * *', duration: 6h}]"
    desk.wall = 1_800_057_600 + 7 * 3600.0  # 07:00 in UTC
    first = await begun(desk, remote, f", sync: {{selfHeal: true, {windows}}}", a=route("a"))
    desk.wall += 18 * 3600  # 01:00
    remote.write(a=route("a", "new"))
    second = remote.push("at night")
    await desk.apply(route("a", "by-hand"), takeOwnership=True)
    await desk.sync()
    assert desk.condition("Ready") == ("False", "WindowClosed")
    assert desk.condition("Stalled")[0] == "False"
    assert "'0 0 * * *' for 6h (UTC) denies changes" in desk.message()
    assert desk.status()["lastAppliedRevision"] == first
    stored = desk.plane.store.get(Key("route", "a"))
    assert stored is not None
    assert stored.resolved["match"]["modelNames"] == ["a-name"]
    desk.wall += 5 * 3600
    await desk.step()
    assert desk.status()["lastAppliedRevision"] == second


@pytest.mark.nightly
async def test_a_failed_commit_is_tried_again_and_a_newer_one_at_once(desk: Desk, remote: Remote) -> None:
    await begun(desk, remote, a=route("a"))
    await desk.apply(route("mine", "wanted"))
    remote.write(b=route("b", "wanted"))
    remote.push("its name is another's")
    await desk.step(2)
    assert desk.message() == (
        "b.yaml:4:29: spec.match.modelNames[0]: the model name 'wanted' is already served by route/mine"
    )
    desk.intents.delete(Key("route", "mine"))
    desk.gone("mine")
    await desk.step(5)
    assert desk.names() == ["a"], "not before the interval of tries"
    await desk.step(30)
    assert desk.names() == ["a", "b"], "the same commit"
    await desk.apply(route("mine", "again"))
    remote.write(c=route("c", "again"))
    remote.push("wrong")
    await desk.step(2)
    assert desk.condition("Ready") == ("False", "ValidationFailed")
    remote.write(c=route("c"))
    remote.push("mended")
    await desk.step(2)
    assert desk.names() == ["a", "b", "c", "mine"]


@pytest.mark.nightly
async def test_a_name_goes_from_one_object_to_another_in_one_commit(desk: Desk, remote: Remote) -> None:
    await begun(desk, remote, PRUNE, a=route("a", "shared"), b=route("b"))
    (remote.work / "a.yaml").unlink()
    remote.write(z=route("z", "shared"))
    remote.push("renamed")
    await desk.step(2)
    assert desk.names() == ["b", "z"]


@pytest.mark.nightly
async def test_what_is_declared_and_still_going_is_waited_for(desk: Desk, remote: Remote) -> None:
    await begun(desk, remote, PRUNE, a=route("a"), b=route("b"))
    (remote.work / "a.yaml").unlink()
    remote.push("away")
    await desk.step(2)
    git(remote.work, "revert", "--no-edit", "HEAD")
    back = remote.push("and back")
    again = await desk.step(2)
    assert again is not None
    assert again <= 1
    assert desk.condition("Ready") == ("False", "NotSynced")
    desk.gone("a")
    await desk.step(again)
    assert desk.names() == ["a", "b"]
    assert desk.status()["lastAppliedRevision"] == back


async def test_what_is_waited_for_holds_up_nothing_else(desk: Desk, remote: Remote) -> None:
    first = await begun(desk, remote, PRUNE, a=route("a"), b=route("b"), d=route("d"))
    desk.plane.store.mark_deleting(Key("route", "a"))
    (remote.work / "d.yaml").unlink()
    remote.write(a=route("a", "new"), b=route("b", "newer"), c=route("c"))
    commit = remote.push("goes on")
    again = await desk.step(2)
    assert again is not None
    assert again <= 1
    assert desk.names() == ["b", "c"]
    changed = desk.plane.store.get(Key("route", "b"))
    assert changed is not None
    assert changed.intent["spec"]["match"]["modelNames"] == ["newer"]
    assert desk.message() == "route/a: deleted, and not gone yet"
    assert desk.status()["lastAppliedRevision"] == first
    await desk.step(again)
    assert [each["commit"] for each in desk.status()["history"]] == [commit, first], "waiting is no news"
    desk.gone("a", "d")
    await desk.step(again)
    assert desk.names() == ["a", "b", "c"]
    assert desk.status()["lastAppliedRevision"] == commit
    assert desk.condition("Ready") == ("True", "Synced")
    assert desk.status()["history"][0]["changed"] == ["route/a created"]


async def test_a_repository_names_no_file_of_this_machine(desk: Desk, remote: Remote, tmp_path: Path) -> None:
    first = await begun(desk, remote, a=route("a"))
    private = tmp_path / "private"
    private.write_text("a secret")
    for line, place in (
        (f"tokenizer: {{chatTemplateFile: {private}}}", "m.yaml:6:33: spec.tokenizer.chatTemplateFile"),
        (f"env: [{{name: QUIRE_SCHEDULE_TRACE, value: {private}}}]", "m.yaml:6:45: spec.env[0].value"),
    ):
        remote.write(m=f"{MODEL}  {line}\n")
        remote.push()
        await desk.sync()
        assert desk.condition("Ready") == ("False", "ValidationFailed")
        assert desk.message() == f"{place}: a manifest of a repository names no file of this machine"
        assert desk.status()["lastAppliedRevision"] == first
    for which, value in (("file", private), ("env", "HOME")):
        remote.write(m=POLICY.format(which=which, value=value))
        remote.push()
        await desk.sync()
        place = f"m.yaml:5:{35 + len(which) - 1}: spec.keys[0].valueFrom.{which}"
        said = "file" if which == "file" else "variable"
        assert desk.message() == f"{place}: a manifest of a repository names no {said} of this machine"
        remote.write(m=f"{MODEL.replace('builtin://tiny', 'hf://a/b')}  sourceAuth: {{{which}: {value}}}\n")
        remote.push()
        await desk.sync()
        told = f"spec.sourceAuth.{which}: a manifest of a repository names no {said} of this machine"
        assert desk.message().endswith(told)


POLICY = """\
apiVersion: quire.dev/v1alpha1
kind: AccessPolicy
metadata: {{name: m}}
spec:
  keys: [{{name: k, valueFrom: {{{which}: {value}}}}}]
"""
MODEL = """\
apiVersion: quire.dev/v1alpha1
kind: Model
metadata: {name: m}
spec:
  source: builtin://tiny
"""


async def test_only_signed_commits_are_applied(desk: Desk, remote: Remote, tmp_path: Path) -> None:
    keys = []
    for name in ("ada", "eve"):
        path = tmp_path / name
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"{name}@x", "-f", path], check=True)
        keys.append(path.with_suffix(".pub").read_text().strip())
    sign = ("-c", "gpg.format=ssh", "-c", f"user.signingKey={tmp_path / 'ada'}")
    remote.write(a=route("a"))
    git(remote.work, "add", "--all")
    git(remote.work, *sign, "commit", "--quiet", "-S", "-m", "signed")
    git(remote.work, "push", "--quiet", "origin", "HEAD:main")
    await desk.apply(source(remote, more=f", verify: {{signedBy: ['{keys[0]}']}}"))
    await desk.step()
    assert desk.condition("Ready") == ("True", "Synced")
    first = desk.status()["lastAppliedRevision"]
    remote.write(a=route("a", "no"))
    remote.push("not signed")
    await desk.step(2)
    assert desk.condition("Ready") == ("False", "NotVerified")
    sign = ("-c", "gpg.format=ssh", "-c", f"user.signingKey={tmp_path / 'eve'}")
    git(remote.work, *sign, "commit", "--quiet", "--amend", "-S", "-m", "signed by another")
    git(remote.work, "push", "--quiet", "--force", "origin", "HEAD:main")
    await desk.step(2)
    assert desk.condition("Ready") == ("False", "NotVerified")
    assert desk.status()["lastAppliedRevision"] == first
    await desk.apply(source(remote, more=f", verify: {{signedBy: ['{keys[0]}', '{keys[1]}']}}"))
    await desk.step()
    assert desk.condition("Ready") == ("True", "Synced")


async def test_a_private_repository_opens_with_its_token(desk: Desk, tmp_path: Path) -> None:
    remote = Remote(tmp_path / "private", token="s3cret-t0ken")
    try:
        remote.write(a=route("a"))
        remote.push()
        await desk.apply(source(remote))
        await desk.step()
        assert desk.condition("Ready") == ("False", "Unauthorized")
        await desk.apply(source(remote, more=", auth: {secretRef: token}"))
        await desk.step()
        assert desk.condition("Ready") == ("False", "SecretNotFound")
        desk.plane.secrets.put("token", "wrong")
        await desk.sync()
        assert desk.condition("Ready") == ("False", "Unauthorized")
        assert "wrong" not in str(desk.status())
        desk.plane.secrets.put("token", "s3cret-t0ken")
        await desk.sync()
        assert desk.condition("Ready") == ("True", "Synced")
        for path in desk.plane.state.git.rglob("*"):
            assert not path.is_file() or b"s3cret" not in path.read_bytes()
    finally:
        remote.close()


async def test_hostile_repositories_are_refused_by_name(desk: Desk, remote: Remote) -> None:
    await begun(desk, remote, a=route("a"))

    def commit_of(*entries: tuple[str, str, bytes]) -> None:
        """A commit with entries that no work tree could hold; blobs by their contents."""
        lines = b""
        for mode, name, content in entries:
            kind, blob = "commit", content.decode(errors="replace")
            if mode != "160000":
                kind, blob = "blob", git(remote.work, "hash-object", "-w", "--stdin", given=content)
            lines += f"{mode} {kind} {blob}\t".encode()
            lines += name.encode("utf-8", "surrogateescape") + b"\0"
        tree = git(remote.work, "mktree", "-z", "--missing", given=lines)
        commit = git(remote.work, "commit-tree", tree, "-m", "hostile")
        git(remote.work, "push", "--quiet", "--force", "origin", f"{commit}:refs/heads/main")

    text = route("x").encode()
    for entries, told in (
        ([("120000", "x.yaml", b"/etc/passwd")], "x.yaml:1:1: is a symbolic link"),
        ([("120000", "folder", b"../..")], "folder:1:1: is a symbolic link"),
        ([("160000", "sub", b"a" * 40)], "sub:1:1: is a submodule"),
        ([("100644", "x.yaml", text + b"#\xff")], "x.yaml:5:2: byte 0xff is not UTF-8"),
        ([("100644", "x.yaml", "\ufeff".encode("utf-16") + text)], "x.yaml:1:1: byte 0xff is not UTF-8"),
        ([("100644", "a\udcff.yaml", text)], "the file's name is not printable UTF-8"),
        ([("100644", "a\x1b[2J.yaml", text)], "the file's name is not printable UTF-8"),
        ([("100644", "x.yaml", b"#" * (1 << 20) + b"\n")], "x.yaml:1:1: the file is larger than 1 MiB"),
        ([("100644", f"{n}.yaml", b"#" * 1_000_000) for n in range(20)], "the manifests are 19 MiB together"),
        ([("100644", "x.yaml", source(remote, "other").encode())], "a GitSource is applied by hand"),
        ([("100644", "x.yaml", b"a: &a [*a]")], "x.yaml:"),
    ):
        commit_of(*entries)
        await desk.sync()
        assert told in desk.message(), (told, desk.message())
        assert desk.condition("Stalled")[0] == "True"
        assert desk.message().isprintable()
        assert desk.names() == ["a"]
    commit_of(("120000", "README.md", b"/etc/passwd"), ("100644", "a.yaml", route("a").encode()),
              ("100644", ".hidden.yaml", b"{"), ("100755", "b.yml", route("b").encode()))  # fmt: skip
    await desk.sync()
    assert desk.condition("Ready") == ("True", "Synced"), desk.message()
    assert desk.names() == ["a", "b"]


async def many_files(remote: Remote, number: int) -> None:
    """Push a commit with so many files."""
    blob = git(remote.work, "hash-object", "-w", "--stdin", given=b"x")
    files = b"".join(b"100644 blob %s\tf%d\0" % (blob.encode(), n) for n in range(number))
    tree = git(remote.work, "mktree", "-z", given=files)
    commit = git(remote.work, "commit-tree", tree, "-m", "many")
    git(remote.work, "push", "--quiet", "--force", "origin", f"{commit}:refs/heads/main")


@pytest.mark.nightly
async def test_a_hundred_thousand_files_are_too_many(desk: Desk, remote: Remote) -> None:
    await begun(desk, remote, a=route("a"))
    await many_files(remote, 100_000)
    await desk.sync()
    assert desk.condition("Ready") == ("False", "RepositoryTooLarge")
    assert "more than 10000 files" in desk.message()
    assert desk.names() == ["a"]


@pytest.mark.nightly
async def test_repositories_beyond_the_bounds_are_named(desk: Desk, remote: Remote) -> None:
    desk.limits = Limits(pack_bytes=1 << 20, files=50)
    desk.begin()
    await begun(desk, remote, a=route("a"))
    await many_files(remote, 51)
    await desk.sync()
    assert desk.condition("Ready") == ("False", "RepositoryTooLarge")
    assert "more than 50 files" in desk.message()
    big = git(remote.work, "hash-object", "-w", "--stdin", given=random.Random(1).randbytes(3 << 20))
    tree = git(remote.work, "mktree", given=f"100644 blob {big}\tbig.bin\n".encode())
    commit = git(remote.work, "commit-tree", tree, "-m", "big")
    git(remote.work, "push", "--quiet", "--force", "origin", f"{commit}:refs/heads/main")
    await desk.sync()
    assert desk.condition("Ready") == ("False", "RepositoryTooLarge"), desk.message()
    assert "larger than 1 MiB" in desk.message()
    assert not list(desk.plane.state.git.rglob("tmp_*"))
    assert desk.names() == ["a"]


@pytest.mark.nightly
async def test_what_is_not_there_is_named(desk: Desk, remote: Remote) -> None:
    await begun(desk, remote, a=route("a"))
    for more, reason in (
        (", ref: {branch: none}", "RefNotFound"),
        (", ref: {tag: v1}", "RefNotFound"),
        (f", ref: {{commit: {'0' * 40}}}", "RefNotFound"),
    ):
        await desk.apply(source(remote).replace(", ref: {branch: main}", more))
        await desk.step()
        assert desk.condition("Ready") == ("False", reason), (more, desk.message())
    await desk.apply(source(remote).replace("/r.git", "/none.git"))
    await desk.step()
    assert desk.condition("Ready") == ("False", "NotFound")
    git(remote.work, "tag", "-a", "v1", "-m", "one")
    git(remote.work, "push", "--quiet", "origin", "v1")
    for more in (", ref: {tag: v1}", f", ref: {{commit: {remote.head}}}", ""):
        await desk.apply(source(remote).replace(", ref: {branch: main}", more))
        await desk.step()
        assert desk.condition("Ready") == ("True", "Synced"), desk.message()


@pytest.mark.nightly
async def test_a_redirect_is_not_followed(desk: Desk, remote: Remote, tmp_path: Path) -> None:
    other = Remote(tmp_path / "other")
    try:
        other.redirect = remote.url
        remote.write(a=route("a"))
        remote.push()
        await desk.apply(source(other))
        await desk.step()
        assert "redirects to another address" in desk.message()
        assert not remote.requests
        assert desk.names() == []
    finally:
        other.close()


@pytest.mark.nightly
async def test_a_server_without_an_end_is_left_in_time(desk: Desk, remote: Remote, tmp_path: Path) -> None:
    del tmp_path
    with socket.create_server(("127.0.0.1", 0)) as silent:
        desk.limits = Limits(seconds=0.5)
        desk.begin()
        text = source(remote).replace(remote.url, f"http://127.0.0.1:{silent.getsockname()[1]}/r.git")
        await desk.apply(text)
        await desk.step()
    assert desk.condition("Fetched") == ("False", "RemoteUnreachable")
    assert "took longer than 0.5 s" in desk.message("Fetched")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


async def test_a_notification_that_is_signed_is_a_hint_and_no_other_is(desk: Desk, remote: Remote) -> None:
    port = free_port()
    provider = "github"
    desk.plane.secrets.put("hook", "shh-1234")

    def webhook() -> str:
        text = source(remote, more=f", webhook: {{provider: {provider}, secretRef: hook, port: {port}}}")
        return text.replace("interval: 1s", "interval: 1h")

    async def send(**headers: str) -> int:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        async with httpx.AsyncClient(timeout=10) as http:
            answer = await http.post(f"http://127.0.0.1:{port}/hooks/prod", content=BODY, headers=names)
            return answer.status_code

    await begun(desk, remote, a=route("a"))
    await desk.apply(webhook())
    hooks = desk.plane.hooks
    desk.sources.listens = hooks.problem
    try:
        await hooks.settle({port})
        await desk.step()
        assert desk.condition("WebhookListening") == ("True", "Listening")
        signed = hmac.new(b"shh-1234", BODY, "sha256").hexdigest()
        asked = len(remote.requests)
        assert await send() == 401
        assert await send(X_Hub_Signature_256=f"sha256={hmac.new(b'', BODY, 'sha256').hexdigest()}") == 401
        assert await send(X_Hub_Signature_256=f"sha256={signed[:-1]}0") == 401 or signed.endswith("0")
        async with httpx.AsyncClient() as http:
            for path, wanted in (("/hooks/none", 401), ("/", 404), ("/hooks/../v1/objects", 404)):
                assert (await http.post(f"http://127.0.0.1:{port}{path}", content=BODY)).status_code == wanted
            assert (await http.get(f"http://127.0.0.1:{port}/hooks/prod")).status_code == 405
        await desk.step(1)
        assert len(remote.requests) == asked, "the interval is an hour"
        remote.write(b=route("b"))
        pushed = remote.push("told of")
        for _ in range(8):
            assert await send(X_Hub_Signature_256=f"sha256={signed}") == 202
            await desk.step(0.5)
        assert desk.status()["lastAppliedRevision"] == pushed
        assert len(remote.requests) - asked <= 3 * 3, "eight notifications in 4 s are two looks"
        provider = "gitlab"
        await desk.apply(webhook())
        assert await send(X_Gitlab_Token="shh-1234") == 202
        assert await send(X_Gitlab_Token="shh-123") == 401
        assert await send(X_Hub_Signature_256=f"sha256={signed}") == 401
        provider = "gitea"
        await desk.apply(webhook())
        assert await send(X_Gitea_Signature=signed) == 202
        await desk.apply(source(remote))
        assert await send(X_Gitea_Signature=signed) == 401
    finally:
        await hooks.close()
    with socket.create_server(("127.0.0.1", port)) as other:
        await hooks.settle({port})
        assert "in use by another program" in str(hooks.problem(port))
        other.close()
        await hooks.settle({port})
        assert hooks.problem(port) is None
        await hooks.close()


BODY = b'{"ref": "refs/heads/evil", "repository": {"url": "https://evil.example"}}'

STAND_IN = """\
#!/bin/sh
test -z "$QUIRE_SECRET" && test "$PATH" != /usr/bin || exit 9
cd "$2" || exit 1
test -f ../base/base.yaml || { echo "no $PWD/../base/base.yaml" >&2; exit 1; }
while read -r line; do echo "$line"; done < ../base/base.yaml
"""
"""What the tests know of kustomize: it is called as `kustomize build FOLDER` and prints documents."""


@pytest.mark.nightly
async def test_a_folder_with_a_kustomization_is_built(desk: Desk, remote: Remote, tmp_path: Path) -> None:
    remote.write(base__base=route("built"), over__kustomization="resources: [../base/base.yaml]\n")
    first = remote.push()
    await desk.apply(source(remote, more=", path: over"))
    command = tmp_path / "bin" / "kustomize"
    command.parent.mkdir()
    command.with_name("git").symlink_to(shutil.which("git") or "")
    desk.environ = {**os.environ, "QUIRE_SECRET": "x", "PATH": str(command.parent)}
    desk.begin()
    await desk.step()
    assert desk.condition("Ready") == ("False", "KustomizeFailed")
    assert "there is no kustomize or kubectl" in desk.message()
    command.write_text(STAND_IN)
    command.chmod(0o755)
    desk.begin()
    await desk.step()
    assert desk.status()["lastAppliedRevision"] == first, desk.message()
    assert desk.names() == ["built"]
    assert desk.status()["objects"][0]["file"] == "over/kustomization.yaml (built)"
    for text, told in (
        (
            "resources: ['http://127.0.0.1:1/x.yaml']\n",
            "1:13: 'http://127.0.0.1:1/x.yaml' is refused: it names an",
        ),
        ("resources: [github.com/a/b]\n", "1:13: 'github.com/a/b' is refused: it names an address"),
        ("transformers: [x.yaml]\n", "over/kustomization.yaml:1:1: transformers is refused"),
        ("a: !!python/name x\n", "over/kustomization.yaml:1:"),
    ):
        remote.write(over__kustomization=text)
        remote.push()
        await desk.sync()
        assert desk.condition("Ready") == ("False", "KustomizeFailed")
        assert told in desk.message()
    remote.write(over__kustomization="resources: []\n")
    (remote.work / "base/base.yaml").unlink()
    remote.push()
    await desk.sync()
    assert desk.message() == "kustomize: over: no over/../base/base.yaml"
    assert not list(desk.plane.state.git.rglob("build-*"))


needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="runs where there is a kubectl, whose kustomize is 5 or later"
)
BASE = """\
apiVersion: quire.dev/v1alpha1
kind: Model
metadata: {name: tiny}
spec: {source: 'builtin://tiny', replicas: 0}
"""
OVERLAY = """\
resources: [../base]
namePrefix: prod-
patches:
- target: {kind: Model}
  patch: |-
    - {op: add, path: /spec/batching, value: {maxQueueLength: 7}}
"""


@needs_kubectl
async def test_an_overlay_is_what_kustomize_makes_of_it(desk: Desk, remote: Remote, tmp_path: Path) -> None:
    """By kustomize itself, as kubectl brings it along."""
    remote.write(base__base=BASE, base__kustomization="resources: [base.yaml]\n", over__kustomization=OVERLAY)
    commit = remote.push()
    await desk.apply(source(remote, more=", path: over"))
    only = tmp_path / "bin"
    only.mkdir()
    for name in ("git", "kubectl"):
        (only / name).symlink_to(shutil.which(name) or "")
    desk.environ = {**os.environ, "PATH": str(only)}
    desk.begin()
    await desk.step()
    assert desk.status()["lastAppliedRevision"] == commit, desk.message()
    assert desk.names("model") == ["prod-tiny"]
    stored = desk.plane.store.get(Key("model", "prod-tiny"))
    assert stored is not None
    assert stored.resolved["batching"]["maxQueueLength"] == 7


@needs_kubectl
def test_what_kustomize_prints_is_applied_through_a_pipe(plane: Plane, tmp_path: Path) -> None:
    for name, text in (
        ("base/base.yaml", BASE), ("base/kustomization.yaml", "resources: [base.yaml]\n"),
        ("over/kustomization.yaml", OVERLAY),
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    built = subprocess.run(["kubectl", "kustomize", tmp_path / "over"], capture_output=True, check=True).stdout
    said = subprocess.run(
        [Path(sys.executable).parent / "platform", "apply", "-f", "-"],
        input=built,
        capture_output=True,
        env={**os.environ, "QUIRE_STATE_DIR": str(plane.state.root)},
        timeout=60,
    )
    assert said.returncode == 0, said
    assert b"model/prod-tiny  created" in said.stdout
    assert plane.view("prod-tiny")["resolved"]["batching"]["maxQueueLength"] == 7


def test_the_environment_of_these_tests_has_no_configuration_of_the_machine() -> None:
    assert ENVIRONMENT["GIT_CONFIG_GLOBAL"] == os.devnull
