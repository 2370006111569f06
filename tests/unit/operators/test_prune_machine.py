"""What git sources delete, under any order of commits, hands, caps, crashes and other sources: I12.

The reconciler and the store are the real ones. The repository is one in memory: the real git is
`tests/integration/test_git_sources.py`'s part, and the decision alone `test_source_sync`'s.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from tests.effort import EFFORT, first_in_ci, times

from quire_operators import gitops, source_sync
from quire_operators.git import Commit, Entry, Limits, Ref, Unreachable
from quire_operators.gitops import Author, SourceReconciler
from quire_operators.inventory import Managed
from quire_operators.records import Applied, Change
from quire_operators.secrets import Secrets
from quire_operators.source_sync import Departure, SyncPlan
from quire_operators.status import Reason
from quire_operators.store import Store
from quire_schemas.git_source import GitSource
from quire_schemas.manifest import Located, intent_hash
from quire_schemas.quantities import parse_percent
from quire_schemas.resource import Key

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
NAMES = "abcdefgh"
SOURCES = {"one": "abcdef", "two": "efgh"}
"""Which objects the commits of each are of: some of both."""
Content = tuple[tuple[str, int], ...]
"""(name of a model, its number of replicas)."""


class Crash(BaseException):
    """The control plane is killed here."""


class Remotes:
    """All repositories, by URL: where their branch is, and what each commit has."""

    def __init__(self) -> None:
        self.heads: dict[str, str] = {}
        self.contents: dict[str, Content] = {}
        self.away: set[str] = set()

    def push(self, url: str, content: Content) -> None:
        """A commit of the same content is the same commit: a revert, or a push by force, goes back to one."""
        commit = hashlib.sha1(repr(content).encode()).hexdigest()  # as git names them
        self.contents[commit] = content
        self.heads[url] = commit


REMOTES = Remotes()


class InMemory:
    """What the reconciler asks of `git.Repository`."""

    def __init__(
        self, folder: Path, url: str, credential: str | None, environ: Mapping[str, str], limits: Limits | None
    ) -> None:
        self.url, self.credential = url, credential
        self.here: set[str] = set()

    async def head(self, ref: Ref) -> str:
        if self.url in REMOTES.away:
            raise Unreachable(Reason.REMOTE_UNREACHABLE, "no route to it", "")
        return REMOTES.heads[self.url]

    async def fetch(self, commit: str) -> None:
        if self.url in REMOTES.away and commit not in self.here:
            raise Unreachable(Reason.REMOTE_UNREACHABLE, "no route to it", "")
        self.here.add(commit)

    async def has(self, commit: str) -> bool:
        return commit in self.here

    async def about(self, commit: str) -> Commit:
        return Commit(commit, "ada", "a change", 0)

    async def tree(self, commit: str, path: str) -> list[Entry]:
        content = REMOTES.contents[commit]
        return [Entry("100644", f"{name}:{count}", 99, f"m/{name}.yaml".encode()) for name, count in content]

    async def blobs(self, entries: Sequence[Entry]) -> list[bytes]:
        return [manifest(*entry.blob.split(":")) for entry in entries]


def manifest(name: str, replicas: str) -> bytes:
    return (
        f"apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {{name: {name}}}\n"
        f"spec: {{source: 'builtin://tiny', replicas: {replicas}}}\n"
    ).encode()


class HandsOnTheStore:
    """Carries out as `controlplane.intents` does, without looking at the machine; killed where `one_more` says."""

    def __init__(self, world: Prunes) -> None:
        self.world = world

    async def put(
        self,
        resources: Sequence[Located],
        write: Sequence[Key],
        leaving: Sequence[Key],
        rows: Sequence[Managed],
        author: Author,
    ) -> tuple[Applied, ...]:
        self.world.one_more()
        store = self.world.store
        found = {each.key: each for each in resources}
        applied = store.apply([change(store, found[key]) for key in write], managed=rows)
        self.world.one_more()
        return applied

    def take(self, key: Key, author: Author) -> None:
        self.world.note_deletion(key, author)
        self.world.store.mark_deleting(key)
        self.world.one_more()


def change(store: Store, located: Located) -> Change:
    old = store.get(located.key)
    expected = old.resource_version if old is not None else None
    return Change(located.key, located.intent, intent_hash(located.resource), {}, expected)


def source(name: str, cap: str, prune: bool, heal: bool, policy: str) -> Change:
    resource = GitSource.model_validate(
        {
            "apiVersion": "quire.dev/v1alpha1", "kind": "GitSource", "metadata": {"name": name},
            "spec": {
                "url": f"https://git.example/{name}", "path": "m", "ref": {"branch": "main"},
                "sync": {"prune": prune, "maxPrune": cap, "selfHeal": heal, "allowEmpty": True},
                "deletionPolicy": policy,
            },
        }
    )  # fmt: skip
    resolved = resource.spec.model_dump(mode="json", by_alias=True)
    return Change(Key("gitsource", name), {}, f"{cap} {prune} {heal} {policy}", resolved, None)


class Prunes(RuleBasedStateMachine):
    """Two sources, a person, and a control plane that is killed anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="prune-", dir=MEMORY))
        self.now = 1000.0
        self.kill_in: int | None = None
        self.caps: dict[str, str] = {}
        self.prunes: dict[str, bool] = {}
        # what is worked out apart from the product
        self.theirs: dict[str, set[Key]] = {name: set() for name in SOURCES}
        """What each source has: it was in one of its commits that were applied, and it was not let go since."""
        self.at: dict[str, tuple[str, int, set[Key]]] = {}
        """By source: the commit it is at, how many objects it had when it came to it, what it deleted since."""
        REMOTES.heads.clear()
        REMOTES.away.clear()
        self.store = self.opened()
        self.reconciler = self.started()

    def opened(self) -> Store:
        return Store(self.folder / "state.db", lambda: self.now)

    def started(self) -> SourceReconciler:
        secrets = Secrets(self.folder / "secrets", {})
        made = SourceReconciler(
            self.store, secrets, self.folder / "clones", {}, lambda: self.now, wall=lambda: self.now,
            rng=random.Random(1),
        )  # fmt: skip
        made.hands = HandsOnTheStore(self)
        return made

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def one_more(self) -> None:
        if self.kill_in is not None:
            self.kill_in -= 1
            if self.kill_in < 0:
                self.kill_in = None
                raise Crash

    # ── what must hold ────────────────────────────────────────────────────────────────────────────────────

    def note_deletion(self, key: Key, author: Author) -> None:
        name = author.source.name
        own, there = self.store.get(author.source), self.store.get(key)
        assert own is not None
        assert there is not None
        if own.deletion_time is not None:  # it goes, and takes its objects along
            assert own.resolved["deletionPolicy"] == "Delete", "I12: they were to stay"
            assert key in self.theirs[name], f"I12: {key} is not an object of {author.source}"
            assert not there.intent_hash.startswith("by hand"), "I12: somebody took it"
            return
        assert self.prunes[name], "I12: it was not to delete anything"
        assert key in self.theirs[name], f"I12: {key} is not an object of {author.source}"
        assert key.name not in dict(REMOTES.contents[author.commit.id]), "I12: the commit has it"
        commit, whole, gone = self.at[name]
        assert commit == author.commit.id, "I12: only for the newest commit is anything deleted"
        gone.add(key)
        assert len(gone) <= parse_percent(self.caps[name]) * whole + 1e-9, "I12: above the cap"

    def note_what_they_have(self) -> None:
        """By the commits that were applied, and by what is still there."""
        for name in SOURCES:
            mine = {key for key, row in self.store.inventory.all().items() if row.source_name == name}
            ever = {Key("model", each) for each in self.ever[name]}
            assert mine <= ever, "I12: in the inventory is what no commit of the source ever had"
            self.theirs[name] = mine
        both = self.theirs["one"] & self.theirs["two"]
        assert not both, "I12: one object of two sources"

    # ── what happens ──────────────────────────────────────────────────────────────────────────────────────

    @initialize(cap=st.sampled_from(["0%", "34%", "50%", "100%"]))
    def start(self, cap: str) -> None:
        self.ever: dict[str, set[str]] = {name: set() for name in SOURCES}
        for name in SOURCES:
            self.declare(name, cap, prune=True, heal=False)
            REMOTES.push(f"https://git.example/{name}", tuple((each, 1) for each in SOURCES[name][:4]))
        self.look("one")

    def declare(self, name: str, cap: str, *, prune: bool, heal: bool, policy: str = "Orphan") -> None:
        made = source(name, cap, prune, heal, policy)
        old = self.store.get(made.key)
        expected = old.resource_version if old is not None else None
        self.store.apply([Change(made.key, {}, made.intent_hash, made.resolved, expected)])
        self.caps[name], self.prunes[name] = cap, prune

    @rule(
        name=st.sampled_from(list(SOURCES)),
        cap=st.sampled_from(["0%", "34%", "50%", "100%"]),
        prune=st.sampled_from([True, True, False]),
        heal=st.booleans(),
    )
    def the_source_is_declared_otherwise(self, name: str, cap: str, prune: bool, heal: bool) -> None:
        self.declare(name, cap, prune=prune, heal=heal)

    @rule(
        name=st.sampled_from(["one", "one", "two"]),
        which=st.sets(st.integers(0, 5), max_size=6),
        count=st.integers(1, 2),
        kill_in=st.sampled_from([None, None, 0, 1, 2, 3]),
    )
    def somebody_pushes(self, name: str, which: set[int], count: int, kill_in: int | None) -> None:
        names = SOURCES[name]
        content = tuple((names[each], count) for each in sorted(which) if each < len(names))
        REMOTES.push(f"https://git.example/{name}", content)
        self.look(name, kill_in)
        self.look(name)

    @rule(cap=st.sampled_from(["34%", "50%"]), kill_in=st.sampled_from([None, 0, 1, 2, 3]))
    def too_many_leave_while_others_come(self, cap: str, kill_in: int | None) -> None:
        REMOTES.away.clear()
        self.declare("one", cap, prune=True, heal=False)
        REMOTES.push("https://git.example/one", tuple((name, 1) for name in "abcd"))
        self.look("one")
        self.what_is_deleted_is_gone()
        self.look("one")
        REMOTES.push("https://git.example/one", tuple((name, 1) for name in "def"))
        self.look("one", kill_in)
        self.look("one")

    @rule(prune=st.booleans(), kill_in=st.sampled_from([None, 0, 1, 2, 3]))
    def one_leaves_beside_one_that_is_nobody_s(self, prune: bool, kill_in: int | None) -> None:
        REMOTES.away.clear()
        self.declare("one", "100%", prune=prune, heal=False)
        self.a_hand_changes_something("h", "apply")
        REMOTES.push("https://git.example/one", tuple((name, 1) for name in "abcd"))
        self.look("one")
        REMOTES.push("https://git.example/one", tuple((name, 1) for name in "abc"))
        self.look("one", kill_in)
        self.look("one")

    @rule(name=st.sampled_from(list(SOURCES)), kill_in=st.sampled_from([None, 0, 1, 2, 3]))
    def a_look(self, name: str, kill_in: int | None) -> None:
        self.look(name, kill_in)

    def a_source_is_deleted(self, name: str, policy: str, hand: str, kill_in: int | None) -> None:
        """It goes as a whole, whatever ends it in between, but for what a hand took."""
        key = Key("gitsource", name)
        self.declare(name, self.caps[name], prune=self.prunes[name], heal=False, policy=policy)
        if hand:
            self.a_hand_changes_something("ae"[name == "two"], hand)
        self.note_what_they_have()
        before, had = {each.key: each for each in self.store.objects("model")}, self.theirs[name]
        self.store.mark_deleting(key)
        self.look(name, kill_in)
        self.look(name)
        assert not self.theirs[name], "I12: it has objects still"
        self.what_is_deleted_is_gone()
        self.look(name)
        assert self.store.get(key) is None, "I12: it stays for nothing"
        for each, old in before.items():
            there = self.store.get(each)
            if old.deletion_time is not None:
                continue
            if policy == "Delete" and each in had and not old.intent_hash.startswith("by hand"):
                assert there is None, "I12: half of it is left"
            else:
                assert there == old, "I12: it was to stay"
        self.declare(name, self.caps[name], prune=self.prunes[name], heal=False)
        self.at.pop(name, None)
        self.ever[name] = set()
        self.look(name)

    def look(self, name: str, kill_in: int | None = None) -> None:
        """A pass over one source, killed after so many of its writes."""
        url = f"https://git.example/{name}"
        head = REMOTES.heads[url]
        key = Key("gitsource", name)
        if url not in REMOTES.away and self.at.get(name, ("",))[0] != head:
            self.at[name] = (head, len(self.theirs[name]), set())
            self.ever[name] |= set(dict(REMOTES.contents[head]))
        self.now += 1000.0
        self.kill_in = kill_in
        try:
            asyncio.run(self.reconciler.reconcile(key))
        except Crash:
            self.store.close()
            self.store = self.opened()
            self.reconciler = self.started()
        finally:
            self.kill_in = None
        self.note_what_they_have()

    @rule()
    def what_is_deleted_is_gone(self) -> None:
        for stored in self.store.objects("model"):
            if stored.deletion_time is not None:
                self.store.remove(stored.key)

    @rule(name=st.sampled_from(NAMES), what=st.sampled_from(["apply", "delete"]))
    def a_hand_changes_something(self, name: str, what: str) -> None:
        key = Key("model", name)
        old = self.store.get(key)
        if what == "delete":
            if old is not None:
                self.store.mark_deleting(key)
        elif old is None or old.deletion_time is None:
            expected = old.resource_version if old is not None else None
            self.store.apply([Change(key, {}, f"by hand {self.now}", {}, expected)])

    @rule(name=st.sampled_from(list(SOURCES)))
    def a_remote_goes_or_comes_back(self, name: str) -> None:
        REMOTES.away ^= {f"https://git.example/{name}"}


class WithDepartures(Prunes):
    """The same with sources that are deleted, and declared again."""

    @rule(
        name=st.sampled_from(list(SOURCES)),
        policy=st.sampled_from(["Delete", "Delete", "Orphan"]),
        hand=st.sampled_from(["", "apply", "delete"]),
        kill_in=st.sampled_from([None, 0, 1, 2, 3]),
    )
    def a_source_goes(self, name: str, policy: str, hand: str, kill_in: int | None) -> None:
        self.a_source_is_deleted(name, policy, hand, kill_in)


QUICK = settings(
    max_examples=times(15, 1_000),
    stateful_step_count=15,
    derandomize=EFFORT == 1,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
UNTIL_CAUGHT = settings(QUICK, max_examples=200, phases=[Phase.generate], report_multiple_bugs=False)


@pytest.fixture(autouse=True)
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gitops, "Repository", InMemory)


def test_no_order_of_commits_hands_and_crashes_deletes_what_it_may_not() -> None:
    run_state_machine_as_test(Prunes, settings=QUICK)


@pytest.mark.nightly
def test_nor_does_any_order_with_sources_that_are_deleted() -> None:
    run_state_machine_as_test(WithDepartures, settings=settings(QUICK, max_examples=times(15, 200)))


def departures() -> None:
    """The ends of a source with four objects, of which a hand took one: killed after each write, or not."""
    for policy, kill_in in (("Orphan", None), *(("Delete", each) for each in (None, 0, 1, 2))):
        world = Prunes()
        try:
            world.start("50%")
            world.a_source_is_deleted("one", policy, "apply", kill_in)
        finally:
            world.teardown()


def test_a_source_goes_with_all_that_it_is_to_take_whatever_ends_it_in_between() -> None:
    departures()


# ── mutants ───────────────────────────────────────────────────────────────────────────────────────────────


def otherwise(monkeypatch: pytest.MonkeyPatch, decide: Callable[..., SyncPlan]) -> None:
    monkeypatch.setattr(gitops, "decide", decide)


def delete_whatever_the_commit_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inventory is not asked."""

    def decide(uid: str, declared: Any, managed: Any, stored: Any, sync: Any, **more: Any) -> SyncPlan:
        everything = {key: Managed(key, uid, "one", "c", "f", "") for key in stored if key.kind == "model"} | dict(
            managed
        )
        return source_sync.decide(uid, declared, everything, stored, sync, **more)

    otherwise(monkeypatch, decide)


def delete_what_another_source_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def decide(uid: str, declared: Any, managed: Any, stored: Any, sync: Any, **more: Any) -> SyncPlan:
        mine = {key: Managed(key, uid, "one", "c", "f", row.intent_hash) for key, row in managed.items()}
        return source_sync.decide(uid, declared, mine, stored, sync, **more)

    otherwise(monkeypatch, decide)


def have_no_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    def decide(uid: str, declared: Any, managed: Any, stored: Any, sync: Any, **more: Any) -> SyncPlan:
        return source_sync.decide(uid, declared, managed, stored, {**sync, "maxPrune": "100%"}, **more)

    otherwise(monkeypatch, decide)


def take_the_cap_of_what_is_there_and_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """New objects in a commit make room to delete more of the old ones."""

    def decide(uid: str, declared: Any, managed: Any, stored: Any, sync: Any, **more: Any) -> SyncPlan:
        new = sum(each.key not in managed for each in declared)
        return source_sync.decide(
            uid, declared, managed, stored, sync, heal=more["heal"], whole=more["whole"] + new
        )

    otherwise(monkeypatch, decide)


def count_anew_after_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written before the crash counts as what was there: more may go."""

    def whole(self: SourceReconciler, stored: Any, memory: Any, target: str, *, is_new: bool) -> int:
        return sum(row.source == stored.uid for row in self._store.inventory.all().values())

    monkeypatch.setattr(SourceReconciler, "_whole", whole)


def delete_though_it_is_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def decide(uid: str, declared: Any, managed: Any, stored: Any, sync: Any, **more: Any) -> SyncPlan:
        return source_sync.decide(uid, declared, managed, stored, {**sync, "prune": True}, **more)

    otherwise(monkeypatch, decide)


def delete_though_they_are_to_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def depart(source: str, managed: Any, stored: Any, spec: Any) -> Departure:
        return source_sync.depart(source, managed, stored, {**spec, "deletionPolicy": "Delete"})

    monkeypatch.setattr(gitops, "depart", depart)


def take_along_what_a_hand_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    def depart(source: str, managed: Any, stored: Any, spec: Any) -> Departure:
        found = source_sync.depart(source, managed, stored, spec)
        return found if spec["deletionPolicy"] == "Orphan" else replace(found, take=(*found.take, *found.stay))

    monkeypatch.setattr(gitops, "depart", depart)


def let_them_go_before_they_are_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash in between leaves objects that nobody deletes."""
    let_go = SourceReconciler.let_go

    def first(self: SourceReconciler, stored: Any) -> float | None:
        departing = self.departure(stored)
        self._store.inventory.drop(departing.take)
        monkeypatch.setattr(self, "departure", lambda stored: departing)
        return let_go(self, stored)

    monkeypatch.setattr(SourceReconciler, "let_go", first)


def go_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source is gone though a crash left half of its objects."""
    let_go = SourceReconciler.let_go

    def hasty(self: SourceReconciler, stored: Any) -> float | None:
        if self._store.inventory.memory(stored.uid).get("leaving"):
            self._store.remove(stored.key)
            return None
        return let_go(self, stored)

    monkeypatch.setattr(SourceReconciler, "let_go", hasty)


@pytest.mark.parametrize(
    "mutate",
    first_in_ci(
        [
            delete_though_it_is_not_to,
            delete_whatever_the_commit_does_not_have,
            delete_what_another_source_has,
            have_no_cap,
            take_the_cap_of_what_is_there_and_what_comes,
            count_anew_after_a_crash,
        ]
    ),
)
def test_the_machine_catches_mutants(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match="I12"):
        run_state_machine_as_test(Prunes, settings=UNTIL_CAUGHT)


@pytest.mark.parametrize(
    "mutate",
    first_in_ci(
        [
            delete_though_they_are_to_stay,
            take_along_what_a_hand_changed,
            let_them_go_before_they_are_deleted,
            go_without_waiting,
        ]
    ),
)
def test_the_ends_of_a_source_catch_mutants(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match="I12"):
        departures()
