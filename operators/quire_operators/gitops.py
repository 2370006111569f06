"""Git sources: what moves them from one commit to the next, and what is told of them.

One pass over a source: ask the remote where its ref is, if that is due; have that commit here, read and checked;
decide (`source_sync`), unless a window forbids it; carry the plan out by the same hands that carry out an apply
from the command line (`Hands`). All documents of a commit are good, or none of it is applied, and what was applied
stays. Nobody waits for health: the next commit is applied whatever became of the last one.

What survives a restart is in the store: which objects are the source's, which commit was applied, what became of
the last ones. The clone is a cache. In memory are only the times of the next look and of the next try, and the
commit that was read last.

A commit that could not be applied is tried again after `retryInterval`: what was wrong may be the machine, not the
commit. A remote that does not answer is asked again after it, doubling up to `LONGEST_PAUSE`. Meanwhile the
applied commit is still guarded: what a hand changed is written back from the clone where `selfHeal` says so.

A source that is deleted is there until what its `deletionPolicy` deletes with it is gone. Which objects these are,
by their uids, is kept before the first of them is deleted: a crash anywhere leaves a source that goes on with it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from quire_operators import kustomize, status
from quire_operators.clock import on_the_wall
from quire_operators.database import Deposed
from quire_operators.git import Commit, Entry, GitError, Limits, Ref, Refused, Repository, Unreachable, below
from quire_operators.inventory import Managed
from quire_operators.overrides import Kind, Override
from quire_operators.records import Applied, StoredObject
from quire_operators.secrets import SecretNotFound, Secrets
from quire_operators.source_sync import Declared, Departure, Present, SyncPlan, decide, depart
from quire_operators.sqlite import StoreError
from quire_operators.status import Fact, Reason
from quire_operators.store import Store
from quire_operators.tracing import acted
from quire_schemas import manifest
from quire_schemas.access import AccessPolicy, KeySource
from quire_schemas.manifest import Located, Problem, intent_hash
from quire_schemas.manifest_files import MANIFEST_SUFFIXES
from quire_schemas.model import Model, SecretReference
from quire_schemas.quantities import parse_duration
from quire_schemas.resource import Key
from quire_schemas.rules import ENGINE_VARIABLES
from quire_schemas.windows import closed_by
from quire_schemas.yaml_tree import MAX_BYTES

KIND = "gitsource"
HISTORY = 10
SHOWN_PROBLEMS = 20
LONGEST_PAUSE = 300.0
HINT_SECONDS = 2.0
"""Between two looks at a remote that notifications ask for."""
WISHED = (Reason.STOPPED, Reason.ON_DEMAND, Reason.SCALED_TO_ZERO)
"""Reasons for which an object does not serve now and is as its manifest says."""
SOON = 1.0
"""Between two looks at what is on its way: objects that are being deleted, or do not serve yet."""


@dataclass(frozen=True, slots=True)
class Author:
    """On whose behalf something is applied: a source, at a commit."""

    source: Key
    commit: Commit

    def __str__(self) -> str:
        return f"{self.source} @ {self.commit.id[:7]}"

    @property
    def cause(self) -> str:
        """What a new revision says that it is for."""
        return f"{self.source.name}@{self.commit.id[:7]}: {self.commit.subject}".rstrip(": ")


class Rejected(Exception):
    """What a commit declares cannot be applied: nothing of it was."""

    def __init__(
        self,
        message: str,
        hint: str = "",
        problems: Sequence[Problem] = (),
        reason: Reason = Reason.VALIDATION_FAILED,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.problems = tuple(problems)
        self.reason = reason


class Hands(Protocol):
    """Who carries out what is decided: the same functions as for the command line."""

    async def put(
        self,
        resources: Sequence[Located],
        write: Sequence[Key],
        leaving: Sequence[Key],
        rows: Sequence[Managed],
        author: Author,
    ) -> tuple[Applied, ...]:
        """Check all `resources` as an apply would, while those `leaving` are about to go; then write those that
        `write` names, in its order, and `rows`, in one transaction. Raises `Rejected`, `StoreError`."""
        ...

    def take(self, key: Key, author: Author) -> None:
        """Begin to delete an object. Raises `StoreError`."""
        ...


@dataclass(frozen=True, slots=True)
class Checkout:
    """A commit, read and parsed. `problems` are why it cannot be applied."""

    commit: Commit
    path: str
    signer: str
    resources: tuple[Located, ...]
    declared: tuple[Declared, ...]
    problems: tuple[Problem, ...]

    def row(self, key: Key, source: StoredObject) -> Managed:
        """What the inventory says of one of its objects once it is applied."""
        each = next(found for found in self.declared if found.key == key)
        return Managed(key, source.uid, source.key.name, self.commit.id, each.file, each.intent_hash)


@dataclass(frozen=True, slots=True)
class _Trouble:
    """Why the newest commit is not applied."""

    reason: Reason
    message: str
    hint: str = ""
    problems: tuple[Problem, ...] = ()
    passing: bool = False
    """It may well go by itself."""


@dataclass(slots=True)
class _Look:
    """What is in memory of one source, of one generation of it."""

    generation: int
    repository: Repository
    due: float = 0.0
    """When the remote is asked next."""
    failures: int = 0
    failure: GitError | None = None
    """Why the last look failed."""
    head: str | None = None
    looked: float | None = None
    """When the remote was asked last."""
    wanted: int = 0
    """How often somebody wanted it synced at once, healed included; `done` of them are."""
    done: int = 0
    asked: bool = False
    """The pass under way is such a one."""
    tried: str | None = None
    """The commit that failed last, and why; `retry` is when it is tried again."""
    trouble: _Trouble | None = None
    retry: float = 0.0
    checkouts: dict[str, Checkout] = field(default_factory=dict)
    """By commit: the one that is to be applied, and the one that is."""


class SourceReconciler:
    """All git sources of one control plane. `folder` holds the clones; `clock` is the store's, `wall` tells what
    time people have. `hands` is set before the first pass."""

    hands: Hands
    listens: Callable[[int], str | None] = staticmethod(lambda port: "nothing listens for notifications")
    """Why nothing listens for notifications on a port; None when something does."""

    def __init__(
        self,
        store: Store,
        secrets: Secrets,
        folder: Path,
        environ: Mapping[str, str],
        clock: Callable[[], float],
        *,
        wall: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._store = store
        self._secrets = secrets
        self._folder = folder
        self._environ = environ
        self._clock = clock
        self._wall = wall
        self._rng = rng or random.Random()  # noqa: S311 - jitter, not a secret
        self._limits = limits
        self._looks: dict[str, _Look] = {}

    # ── what others ask ───────────────────────────────────────────────────────────────────────────────────

    def objects(self) -> list[Key]:
        return [stored.key for stored in self._store.objects(KIND)]

    def has_left(self, key: Key) -> bool:
        """Whether an object left the repository that it came from, and is there only because nobody deleted it."""
        row = self._store.inventory.manager(key)
        source = self._store.get(row.owner) if row is not None else None
        return source is not None and str(key) in self._store.status(source.uid).get("kept", ())

    def ask(self, stored: StoredObject) -> None:
        """Have the remote looked at in the next pass, and everything put as it is there."""
        look = self._looks.get(stored.uid)
        if look is not None:
            look.wanted += 1

    def hint(self, name: str) -> bool:
        """Somebody says that there is something new: the remote is asked soon, however often that is said; whether
        there is such a source."""
        stored = self._store.get(Key(KIND, name))
        look = self._looks.get(stored.uid) if stored is not None else None
        if look is not None:
            look.due = min(look.due, max(self._clock(), (look.looked or 0.0) + HINT_SECONDS))
        return stored is not None

    def webhooks(self) -> dict[str, Mapping[str, Any]]:
        """What each source that takes notifications takes them by: its resolved `spec.webhook`, by name."""
        found = {}
        for stored in self._store.objects(KIND):
            if stored.deletion_time is None and stored.resolved["webhook"] is not None:
                found[stored.key.name] = stored.resolved["webhook"]
        return found

    def suspended(self, stored: StoredObject) -> Override | bool:
        """Whether a source is to apply nothing; the override, if that is why."""
        for override in self._store.overrides(stored.uid):
            if override.kind is Kind.SUSPEND:
                return override
        return bool(stored.resolved["suspend"])

    # ── one pass ──────────────────────────────────────────────────────────────────────────────────────────

    async def reconcile(self, key: Key) -> float | None:
        """Seconds until it wants to run again, or None to wait for a hint."""
        stored = self._store.get(key)
        if stored is None:
            return None
        if stored.deletion_time is not None:
            return self.let_go(stored)
        look = self._look_of(stored)
        memory = self._store.inventory.memory(stored.uid)
        plan, trouble, pending = None, None, None
        wanted, look.asked = look.wanted, look.wanted > look.done
        if not self.suspended(stored):
            if look.due <= self._clock() or look.asked:
                look.looked = self._clock()
                await self._ask_remote(stored, look)
            target = look.head or memory.get("applied")
            if target is not None:
                plan, trouble, pending = await self._advance(stored, look, memory, target)
            look.done = wanted
        memory = self._store.inventory.memory(stored.uid)
        self._report(stored, look, memory, plan, trouble, pending)
        return self._again(stored, look, memory, plan, trouble)

    def departure(self, stored: StoredObject) -> Departure:
        """What becomes of its objects when it is deleted now."""
        return depart(stored.uid, self._store.inventory.all(), self._present(), stored.resolved)

    def let_go(self, stored: StoredObject) -> float | None:
        """One pass over a source that is being deleted: its objects first, or not at all, then the source. Seconds
        until it wants to run again, None once it is gone."""
        departing = self.departure(stored)
        memory = self._store.inventory.memory(stored.uid)
        leaving: dict[str, str] = dict(memory.get("leaving", {}))
        for key in (*departing.take, *departing.going):
            if (there := self._store.get(key)) is not None:
                leaving[str(key)] = there.uid
        self._store.inventory.remember(stored.uid, {**memory, "leaving": leaving})
        author = Author(stored.key, Commit(memory.get("applied") or "", "", "the source is deleted", 0))
        refused: dict[Key, str] = {}
        for key in departing.take:
            try:
                self.hands.take(key, author)
            except Rejected as error:
                refused[key] = error.message
        mine = [key for key, row in self._store.inventory.all().items() if row.source == stored.uid]
        if departing.stay:
            told = ", ".join(f"{key}: {why}" for key, why in departing.stay.items())
            self._store.add_event(stored.key, "Normal", "Orphaned", f"these stay, and are nobody's: {told}")
        self._store.inventory.drop([key for key in mine if key not in refused])
        there_now = {str(each.key): each for each in self._store.objects()}
        waits = [
            name
            for name, uid in leaving.items()
            if name in there_now and there_now[name].uid == uid and there_now[name].deletion_time is not None
        ]
        if waits or refused:
            self._report_leaving(stored, waits, refused)
            return SOON if waits else parse_duration(stored.resolved["sync"]["retryInterval"])
        self._looks.pop(stored.uid, None)
        shutil.rmtree(self._folder / stored.uid, ignore_errors=True)
        # one that is there all the same was to be deleted before a crash, and was made another's meanwhile
        gone = [name for name, uid in leaving.items() if name not in there_now or there_now[name].uid != uid]
        told = f"with it {', '.join(gone)}" if gone else "no object was deleted with it"
        self._store.add_event(stored.key, "Normal", "Deleted", f"{told}; nothing follows the repository")
        self._store.remove(stored.key)
        acted("the source is gone")
        return None

    def _report_leaving(self, stored: StoredObject, waits: Sequence[str], refused: Mapping[Key, str]) -> None:
        """Tell what a source that is being deleted waits for."""
        before = self._store.status(stored.uid)
        told = [f"{', '.join(waits)}: being deleted"] if waits else []
        told += [f"{key}: {why}" for key, why in refused.items()]
        facts = [Fact("Ready", False, Reason.DELETING, "; ".join(told))]
        wall = on_the_wall(self._clock(), self._clock)
        shown = status.conditions(facts, before.get("conditions", ()), stored.generation, wall)
        self._store.put_status(
            stored.uid,
            {
                **before,
                "observedGeneration": stored.generation,
                "summary": f"Deleting: {'; '.join(told)}",
                "conditions": shown,
                "remedies": status.remedies(str(stored.key), shown),
            },
        )

    def _look_of(self, stored: StoredObject) -> _Look:
        look = self._looks.get(stored.uid)
        if look is None or look.generation != stored.generation:
            url = stored.resolved["url"]
            clone = self._folder / stored.uid / hashlib.sha256(url.encode()).hexdigest()[:16]
            for other in clone.parent.iterdir() if clone.parent.is_dir() else ():  # builds that a crash left, too
                if other != clone:
                    shutil.rmtree(other, ignore_errors=True)
            repository = Repository(clone, url, None, self._environ, self._limits)
            look = self._looks[stored.uid] = _Look(stored.generation, repository)
        return look

    async def _ask_remote(self, stored: StoredObject, look: _Look) -> None:
        """Ask where the ref is, and say when it is asked next."""
        spec = stored.resolved
        try:
            if (auth := spec.get("auth")) is not None:
                look.repository.credential = self._secrets.value(auth)
            look.head = await look.repository.head(Ref.of(spec["ref"]))
        except SecretNotFound as error:
            look.failure = Refused(Reason.SECRET_NOT_FOUND, error.message, error.hint)
        except GitError as error:
            look.failure = error
        else:
            look.failure, look.failures = None, 0
            look.due = self._clock() + parse_duration(spec["interval"]) * (1 + 0.1 * self._rng.uniform(-1, 1))
            return
        look.head = None
        pause = parse_duration(spec["sync"]["retryInterval"])
        pause = min(pause * 2.0 ** min(look.failures, 20), max(LONGEST_PAUSE, pause))
        look.failures += 1
        look.due = self._clock() + pause * (1 + 0.1 * self._rng.uniform(-1, 1))
        self._store.add_event(stored.key, "Warning", look.failure.reason.value, look.failure.message)

    async def _advance(
        self, stored: StoredObject, look: _Look, memory: dict[str, Any], target: str
    ) -> tuple[SyncPlan | None, _Trouble | None, str | None]:
        """Bring everything to `target`, or keep it at the commit that is applied: the plan that holds now, why it
        is not the newest commit's, and what it waits for."""
        is_new = (target, stored.resolved["path"]) != (memory.get("applied"), memory.get("path"))
        if is_new and (closed := closed_by(stored.resolved["sync"]["windows"], self._wall())) is not None:
            return await self._guard(stored, look, memory), None, f"commit {target[:12]} waits: {closed}"
        if look.tried == target and self._clock() < look.retry and not look.asked:
            return await self._guard(stored, look, memory), look.trouble, None
        try:
            plan = await self._apply(stored, look, memory, target, is_new=is_new)
            look.tried = look.trouble = None
            return plan, None, None
        except GitError as error:
            if not is_new and isinstance(error, Unreachable):
                return None, None, None  # the clone is lost, and the remote away: nothing is wrong
            trouble = _Trouble(error.reason, error.message, error.hint, passing=isinstance(error, Unreachable))
        except Rejected as error:
            trouble = _Trouble(error.reason, error.message, error.hint, error.problems[:SHOWN_PROBLEMS])
        except Deposed:
            raise
        except StoreError as error:
            trouble = _Trouble(Reason.NOT_SYNCED, error.message, error.hint, passing=True)
        look.tried, look.trouble = target, trouble
        look.retry = self._clock() + parse_duration(stored.resolved["sync"]["retryInterval"])
        await self._note_trouble(stored, look, memory, target, trouble)
        return await self._guard(stored, look, self._store.inventory.memory(stored.uid)), trouble, None

    async def _guard(self, stored: StoredObject, look: _Look, memory: dict[str, Any]) -> SyncPlan | None:
        """Keep what is applied as it is, where that is wished, while the newest commit is not: nothing is
        deleted."""
        applied = memory.get("applied")
        if applied is None or memory.get("path") != stored.resolved["path"]:
            return None
        try:
            if applied not in look.checkouts and not await look.repository.has(applied):
                return None
            return await self._apply(stored, look, memory, applied, is_new=False, only_heal=True)
        except (GitError, Rejected, StoreError):  # the newest commit's trouble is what is told
            return None

    async def _apply(
        self,
        stored: StoredObject,
        look: _Look,
        memory: dict[str, Any],
        target: str,
        *,
        is_new: bool,
        only_heal: bool = False,
    ) -> SyncPlan:
        """Carry out what this commit asks for. Raises `GitError`, `Rejected`, `StoreError`: then nothing of it
        was, or a part that the next pass goes on from."""
        checkout = await self._checkout(stored, look, target)
        if checkout.problems:
            raise _rejected(checkout.problems)
        if not checkout.resources and not stored.resolved["sync"]["allowEmpty"]:
            raise Rejected(
                f"commit {target[:12]} has no manifest below {checkout.path}",
                "spec.sync.allowEmpty: true, if there are to be none",
                reason=Reason.NO_MANIFESTS,
            )
        whole = self._whole(stored, memory, target, is_new=is_new)
        plan = self._decide(stored, checkout, whole, heal=look.asked or stored.resolved["sync"]["selfHeal"])
        if only_heal:
            plan = SyncPlan(
                write=plan.healed, healed=plan.healed, drift=plan.drift, kept=plan.kept, blocked=plan.blocked
            )
        if plan.conflicts:
            raise _rejected([_conflict(checkout, key, owner) for key, owner in plan.conflicts.items()])
        author = Author(stored.key, checkout.commit)
        results: tuple[Applied, ...] = ()
        if plan.write or plan.adopt or plan.note or (is_new and not plan.wait):
            rows = [checkout.row(key, stored) for key in (*plan.write, *plan.adopt, *plan.note)]
            resources = [each for each in checkout.resources if each.key not in plan.wait]
            try:
                results = await self.hands.put(resources, plan.write, plan.delete, rows, author)
            except Rejected:
                if plan.wait:  # it may be for want of what is waited for, or because of what is there still
                    return plan
                raise
        for key in plan.delete:
            self.hands.take(key, author)
        if gone := (*plan.delete, *plan.forget):
            self._store.inventory.drop(gone)
        if only_heal and not plan.healed:
            return plan
        if (is_new and not plan.wait) or plan.moves:
            self._note_success(stored, memory, checkout, plan, results, is_new=is_new)
        return plan if plan.is_empty else self._decide(stored, checkout, whole, heal=False)

    def _whole(self, stored: StoredObject, memory: dict[str, Any], target: str, *, is_new: bool) -> int:
        """How many objects the source had when it came to this commit; kept before anything of the commit is
        written, so that no crash and no second pass sees more."""
        of, applied = f"{target}:{stored.resolved['path']}", f"{memory.get('applied')}:{memory.get('path')}"
        known: dict[str, int] = dict(memory.get("whole", {}))
        if of not in known:
            known[of] = sum(row.source == stored.uid for row in self._store.inventory.all().values())
            if is_new:
                # the applied commit's stays, too: the repository may go back to it
                memory["whole"] = {name: count for name, count in known.items() if name in (of, applied)}
                self._store.inventory.remember(stored.uid, memory)
        return known[of]

    def _decide(self, stored: StoredObject, checkout: Checkout, whole: int, *, heal: bool) -> SyncPlan:
        managed, sync = self._store.inventory.all(), stored.resolved["sync"]
        return decide(stored.uid, checkout.declared, managed, self._present(), sync, heal=heal, whole=whole)

    def _present(self) -> dict[Key, Present]:
        return {
            each.key: Present(each.intent_hash, each.deletion_time is not None) for each in self._store.objects()
        }

    # ── reading a commit ──────────────────────────────────────────────────────────────────────────────────

    async def _checkout(self, stored: StoredObject, look: _Look, target: str) -> Checkout:
        found = look.checkouts.get(target)
        if found is None:
            await look.repository.fetch(target)
            signer = ""
            if keys := stored.resolved["verify"]["signedBy"]:
                signer = await look.repository.signer(target, keys)
            found = await self._read(stored, look.repository, target, signer)
            applied = self._store.inventory.memory(stored.uid).get("applied")
            kept = {commit: each for commit, each in look.checkouts.items() if commit == applied}
            look.checkouts = {**kept, target: found}
        return found

    async def _read(self, stored: StoredObject, repository: Repository, target: str, signer: str) -> Checkout:
        path = stored.resolved["path"]
        about, entries = await repository.about(target), await repository.tree(target, path)
        if kustomize.is_overlay([entry.path for entry in entries]):
            limits, scratch = self._limits or Limits(), self._folder / stored.uid / "builds"
            built = await kustomize.build(repository, target, path, scratch, self._environ, limits)
            texts = [(f"{path}/kustomization.yaml (built)", built)]
            problems: list[Problem] = []
        else:
            texts, problems = await read(repository, entries, path)
        # seconds for a MiB: the loop has a lease to keep meanwhile
        return await asyncio.to_thread(_checked, about, path, signer, texts, problems)

    # ── what is remembered and told ───────────────────────────────────────────────────────────────────────

    def _note_success(
        self,
        stored: StoredObject,
        memory: dict[str, Any],
        checkout: Checkout,
        plan: SyncPlan,
        results: Sequence[Applied],
        *,
        is_new: bool,
    ) -> None:
        changed = [f"{item.key} {item.result}" for item in results if item.result != "unchanged"]
        changed += [f"{key} adopted" for key in plan.adopt]
        changed += [f"{key} deleted" for key in plan.delete]
        result = "Healed" if plan.healed and not is_new else "Applied"
        message = plan.blocked or _awaited(plan)
        entry = self._entry(checkout.commit, result, message, changed)
        whole = {} if plan.wait else {"applied": checkout.commit.id, "path": checkout.path}
        self._remember(stored, memory, entry, **whole)
        told = f"commit {checkout.commit.id[:12]} ({checkout.commit.subject}): {', '.join(changed) or 'no change'}"
        self._store.add_event(stored.key, "Normal", "Healed" if result == "Healed" else "Synced", told)
        if plan.blocked is not None:
            self._store.add_event(stored.key, "Warning", Reason.PRUNE_BLOCKED.value, plan.blocked)
        acted(told)

    async def _note_trouble(
        self, stored: StoredObject, look: _Look, memory: dict[str, Any], target: str, trouble: _Trouble
    ) -> None:
        commit = Commit(target, "", "", 0)
        try:
            if await look.repository.has(target):
                commit = await look.repository.about(target)
        except GitError as error:  # then its name alone is told
            acted(error.message)
        message = _place(trouble.problems[0]) if trouble.problems else trouble.message
        if not trouble.passing:
            self._remember(stored, memory, self._entry(commit, "Refused", message, []))
        self._store.add_event(stored.key, "Warning", trouble.reason.value, message)

    def _entry(self, commit: Commit, result: str, message: str, changed: Sequence[str]) -> dict[str, Any]:
        return {
            "commit": commit.id,
            "author": commit.author,
            "subject": commit.subject,
            "result": result,
            "message": message,
            "changed": list(changed),
            "at": self._clock(),
        }

    def _remember(self, stored: StoredObject, memory: dict[str, Any], entry: dict[str, Any], **new: Any) -> None:
        """Keep what became of a commit; the same again is kept once."""
        history = list(memory.get("history", ()))
        same = history and all(history[0][name] == entry[name] for name in ("commit", "result", "message"))
        if not same or entry["changed"]:
            history.insert(0, entry)
        told = {**memory, **new, "attempted": entry["commit"], "history": history[:HISTORY]}
        self._store.inventory.remember(stored.uid, told)

    def _again(
        self,
        stored: StoredObject,
        look: _Look,
        memory: Mapping[str, Any],
        plan: SyncPlan | None,
        trouble: _Trouble | None,
    ) -> float | None:
        if self.suspended(stored):
            return None
        now = self._clock()
        times = [look.due - now]
        if trouble is not None:
            times.append(look.retry - now)
        if (plan is not None and plan.wait) or self._unhealthy(stored):
            times.append(SOON)
        return max(min(times), 0.05)

    def _unhealthy(self, stored: StoredObject) -> list[str]:
        """Objects of the source that do not serve by what was applied."""
        found = []
        for key, row in self._store.inventory.all().items():
            if row.source != stored.uid:
                continue
            there = self._store.get(key)
            conditions = {} if there is None else self._store.status(there.uid)
            shown = {each["type"]: each for each in conditions.get("conditions", ())}
            ready = shown.get("Ready")
            good = there is not None and ready is not None and ready["observedGeneration"] == there.generation
            if good and there is not None and ready is not None:
                wished = ready["status"] == "True" or ready["reason"] in WISHED
                good = wished and shown.get("RolledOut", ready)["status"] in ("True", ready["status"])
            if not good:
                why = "gone" if there is None else ready["reason"] if ready is not None else "new"
                found.append(f"{key}: {why}")
        return found

    def _report(
        self,
        stored: StoredObject,
        look: _Look,
        memory: Mapping[str, Any],
        plan: SyncPlan | None,
        trouble: _Trouble | None,
        pending: str | None,
    ) -> None:
        before = self._store.status(stored.uid)
        wall = on_the_wall(self._clock(), self._clock)
        facts = self._facts(stored, look, memory, plan, trouble, pending)
        shown = status.conditions(facts, before.get("conditions", ()), stored.generation, wall)
        suspended = self.suspended(stored)
        mine = [row for row in self._store.inventory.all().values() if row.source == stored.uid]
        ready = next(fact for fact in facts if fact.type == "Ready")
        applied = memory.get("applied")
        summary = f"{ready.reason.value}: {ready.message}".removesuffix(": ")
        if ready.status and applied:  # and what is not as wished all the same
            wrong = [fact.reason.value for fact in facts if fact.status is (fact.type in status.BAD_WHEN_TRUE)]
            summary = "; ".join([f"Synced {applied[:7]}", *wrong])
        document = {
            "observedGeneration": stored.generation,
            "summary": summary,
            "url": stored.resolved["url"],
            "ref": str(Ref.of(stored.resolved["ref"])),
            "head": look.head,
            "looked": look.looked,
            "lastAppliedRevision": applied,
            "lastAttemptedRevision": memory.get("attempted"),
            "objects": [{"key": str(row.key), "file": row.file, "commit": row.commit} for row in mine],
            "kept": [str(key) for key in plan.kept] if plan is not None else [],
            "problems": [each.as_dict() for each in trouble.problems] if trouble is not None else [],
            "history": [
                {**each, "at": status.timestamp(on_the_wall(each["at"], self._clock))}
                for each in memory.get("history", ())
            ],
            "overrides": [
                {"kind": "suspend", "by": suspended.by, "reason": suspended.reason,
                 "since": status.timestamp(on_the_wall(suspended.at, self._clock))}
            ] if isinstance(suspended, Override) else [],
            "conditions": shown,
            "remedies": status.remedies(str(stored.key), shown),
        }  # fmt: skip
        self._store.put_status(stored.uid, document)

    def _facts(
        self,
        stored: StoredObject,
        look: _Look,
        memory: Mapping[str, Any],
        plan: SyncPlan | None,
        trouble: _Trouble | None,
        pending: str | None,
    ) -> list[Fact]:
        applied = memory.get("applied")
        facts = [Fact("Accepted", True, Reason.VALID), self._fetched(look)]
        stuck = None
        if self.suspended(stored):
            ready = Fact("Ready", False, Reason.SUSPENDED, "nothing is applied")
        elif trouble is not None:
            first = trouble.problems[0] if trouble.problems else None
            more = f" and {len(trouble.problems) - 1} more" if len(trouble.problems) > 1 else ""
            text = trouble.message if first is None else f"{_place(first)}{more}"
            ready = Fact("Ready", False, trouble.reason, text)
            stuck = None if trouble.passing else ready
        elif pending is not None:
            ready = Fact("Ready", False, Reason.WINDOW_CLOSED, pending)
        elif look.failure is not None and not isinstance(look.failure, Unreachable):
            ready = Fact("Ready", False, look.failure.reason, look.failure.message)
            stuck = ready
        elif look.failure is not None and applied is None:
            ready = Fact("Ready", False, look.failure.reason, look.failure.message)
        elif plan is not None and plan.wait:
            ready = Fact("Ready", False, Reason.NOT_SYNCED, _awaited(plan))
        elif applied is None:
            ready = Fact("Ready", False, Reason.NOT_SYNCED, "no commit is applied yet")
        else:
            history = memory.get("history") or [{"subject": ""}]
            ready = Fact("Ready", True, Reason.SYNCED, f"commit {applied[:12]} {history[0]['subject']}".rstrip())
        facts += [ready, self._healthy(stored, applied), self._drifted(plan)]
        if (webhook := stored.resolved["webhook"]) is not None:
            facts.append(self._listening(stored.key.name, webhook))
        facts.append(
            Fact("Stalled", True, stuck.reason, stuck.message)
            if stuck is not None
            else Fact("Stalled", False, Reason.PROGRESS_MADE)
        )
        return facts

    @staticmethod
    def _fetched(look: _Look) -> Fact:
        if look.failure is not None:
            return Fact("Fetched", False, look.failure.reason, look.failure.message)
        if look.head is None:
            return Fact("Fetched", None, Reason.NOT_SYNCED, "the repository was not asked yet")
        return Fact("Fetched", True, Reason.VERIFIED, look.head[:12])

    def _listening(self, name: str, webhook: Mapping[str, Any]) -> Fact:
        problem = self.listens(webhook["port"])
        if problem is not None:
            return Fact("WebhookListening", False, Reason.ADDRESS_IN_USE, problem)
        try:
            self._secrets.value(webhook)
        except SecretNotFound as error:
            return Fact("WebhookListening", False, Reason.SECRET_NOT_FOUND, error.message)
        return Fact("WebhookListening", True, Reason.LISTENING, f"127.0.0.1:{webhook['port']}/hooks/{name}")

    def _healthy(self, stored: StoredObject, applied: str | None) -> Fact:
        if applied is None:
            return Fact("AppliedHealthy", None, Reason.NOT_SYNCED, "no commit is applied yet")
        wrong = self._unhealthy(stored)
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            return Fact("AppliedHealthy", False, Reason.UNHEALTHY, ", ".join(wrong[:5]) + more)
        return Fact("AppliedHealthy", True, Reason.HEALTHY)

    @staticmethod
    def _drifted(plan: SyncPlan | None) -> Fact:
        if plan is not None and plan.blocked is not None:
            return Fact("Drifted", True, Reason.PRUNE_BLOCKED, plan.blocked)
        if plan is not None and plan.drift:
            told = ", ".join(f"{key}: {how}" for key, how in plan.drift.items())
            return Fact("Drifted", True, Reason.MANUAL_CHANGE, told)
        return Fact("Drifted", False, Reason.IN_STEP)


async def read(
    repository: Repository, entries: Sequence[Entry], path: str
) -> tuple[list[tuple[str, bytes]], list[Problem]]:
    """The manifests among the files below `path`, by name: what is hidden is left out, as `platform apply FOLDER`
    does. Links and submodules are no files here: they are problems where they could stand for manifests. Raises
    `GitError`."""
    wanted: list[Entry] = []
    problems: list[Problem] = []
    for entry in entries:
        if any(part.startswith(b".") for part in entry.path.split(b"/")):
            continue
        problem, is_manifest = _judge(below(entry, path))
        if problem is not None:
            problems.append(problem)
        elif is_manifest:
            wanted.append(entry)
    names = [os.fsdecode(below(entry, path).path) for entry in wanted]
    contents = await repository.blobs([entry for entry in wanted if entry.size <= MAX_BYTES])
    found = iter(contents)
    texts = []
    for name, entry in zip(names, wanted, strict=True):
        if entry.size <= MAX_BYTES:
            texts.append((name, next(found)))
        else:
            problems.append(Problem(name, 1, 1, "", "the file is larger than 1 MiB", "split it"))
    return texts, problems


def _checked(
    about: Commit, path: str, signer: str, texts: Sequence[tuple[str, bytes]], problems: list[Problem]
) -> Checkout:
    """What these files declare, and all that is wrong with it but for what only the machine can tell."""
    loaded = manifest.load_contents(texts)
    problems += loaded.problems
    problems += [
        each.problem(
            "kind", "a GitSource is applied by hand, never from a repository", "remove it from the repository"
        )
        for each in loaded.resources
        if each.key.kind == KIND
    ]
    problems += [problem for each in loaded.resources for problem in _files_named(each)]
    declared = (Declared(each.key, each.file, intent_hash(each.resource)) for each in loaded.resources)
    return Checkout(about, path, signer, tuple(loaded.resources), tuple(declared), tuple(problems))


def _files_named(located: Located) -> Iterator[Problem]:
    """Fields that would show, send away, or write over a file of this machine for whoever may push. Folders of
    models are what is served."""
    text = "a manifest of a repository names no file of this machine"
    secrets: list[tuple[str, KeySource | SecretReference | None, str]] = []
    if isinstance(located.resource, AccessPolicy):
        hint = "have its hash there (platform key create), or a secret's name: platform secret set"
        keys = located.resource.spec.keys
        secrets = [(f"spec.keys[{index}].valueFrom", key.value_from, hint) for index, key in enumerate(keys)]
    elif isinstance(located.resource, Model):
        hint = "name a secret, secretRef: platform secret set"
        secrets = [("spec.sourceAuth", located.resource.spec.source_auth, hint)]
    for place, source, hint in secrets:
        if source is not None and source.file is not None:
            yield located.problem(f"{place}.file", text, hint)
        if source is not None and source.env is not None:
            yield located.problem(f"{place}.env", text.replace("file", "variable"), hint)
    if not isinstance(located.resource, Model):
        return
    spec = located.resource.spec
    if spec.tokenizer.chat_template_file is not None:
        hint = "have the template in the model's folder, or in that of spec.tokenizer.source; or apply it by hand"
        yield located.problem("spec.tokenizer.chatTemplateFile", text, hint)
    for index, variable in enumerate(spec.env):
        if variable.name in ENGINE_VARIABLES:
            yield located.problem(f"spec.env[{index}].value", text, "remove it, or apply the model by hand")


def _judge(entry: Entry) -> tuple[Problem | None, bool]:
    """What is wrong with a file of the repository as such, and whether it is a manifest."""
    name = entry.path.decode(errors="backslashreplace")
    shown = name if name.isprintable() else ascii(name)[1:-1]
    is_manifest = name.endswith(MANIFEST_SUFFIXES)
    if entry.is_submodule:
        hint = "keep the manifests in the repository itself, or move it out of spec.path"
        return Problem(shown, 1, 1, "", "is a submodule: its files are not fetched", hint), False
    may_be_folder = "." not in name.rpartition("/")[2]
    if entry.is_link and (is_manifest or may_be_folder):
        hint = "put the file itself there, or move the link out of spec.path"
        return Problem(shown, 1, 1, "", "is a symbolic link: none is followed", hint), False
    if is_manifest and (shown != name or b"\\" in entry.path or "\\x" in name):
        return Problem(shown, 1, 1, "", "the file's name is not printable UTF-8", "rename it"), False
    return None, is_manifest and entry.is_file


def _awaited(plan: SyncPlan) -> str:
    return f"{', '.join(map(str, plan.wait))}: deleted, and not gone yet" if plan.wait else ""


def _rejected(problems: Sequence[Problem]) -> Rejected:
    number = len(problems)
    return Rejected(f"{number} problem{'' if number == 1 else 's'} in the manifests", problems=problems)


def _conflict(checkout: Checkout, key: Key, owner: Key) -> Problem:
    each = next(found for found in checkout.resources if found.key == key)
    return each.problem(
        "metadata.name", f"{key} is an object of {owner}", "one repository has each object: remove it from one"
    )


def _place(problem: Problem) -> str:
    path = f"{problem.path}: " if problem.path else ""
    return f"{problem.file}:{problem.line}:{problem.col}: {path}{problem.message}"
