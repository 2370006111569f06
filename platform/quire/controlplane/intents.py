"""What a person wants: plan it, apply it, delete it, start it again after a `down`.

Everything is decided before anything is written: what `plan` prints, what `apply` refuses and what it stores come
from the same reviews. What only a hub can tell is asked first. Nothing here waits for a process: the objects' keys
go to the work queue, and their status tells the rest.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from quire.controlplane.errors import ApiError, address_in_use, invalid, not_found
from quire.controlplane.plane import ControlPlane
from quire.controlplane.views import Views
from quire_operators import devices
from quire_operators.access import KIND as POLICY
from quire_operators.admission import Ask
from quire_operators.database import Conflict, NotFound
from quire_operators.desired import is_on_demand
from quire_operators.devices import InventoryError
from quire_operators.fleet.local import Life
from quire_operators.gateway import KEY as GATEWAY
from quire_operators.gateway import resolved_spec
from quire_operators.gitops import KIND as SOURCE
from quire_operators.gitops import Author, Rejected
from quire_operators.inventory import Managed
from quire_operators.overrides import Kind, Override
from quire_operators.records import Applied
from quire_operators.review import Refusal, Review, differences, moved, problems, report
from quire_operators.routes import ROUTES
from quire_operators.sources import SourceError
from quire_operators.status import Reason
from quire_schemas import manifest
from quire_schemas.access import AccessPolicy
from quire_schemas.gateway import is_loopback
from quire_schemas.manifest import Located, Problem
from quire_schemas.model import Model
from quire_schemas.resource import Key
from quire_schemas.route import Route

log = logging.getLogger(__name__)

MOVED_SECONDS = 15.0
"""How long a plan waits for the hub to say where branches are now."""
OTHER_PORT = (
    "platform apply manifests/gateway.yaml, a Gateway named default with port 0 for any free one; "
    "or set its spec.port to one that is free"
)


class Intents:
    """What changes the desired state of one control plane, or says what would."""

    def __init__(self, plane: ControlPlane, views: Views) -> None:
        self._plane = plane
        self._views = views

    async def plan(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """What applying these files would do, on this machine or on a declared one. Writes nothing."""
        loaded = _load(body)
        declared = body.get("devices")
        configs = body.get("configs") or {}
        if not isinstance(configs, dict) or not all(isinstance(value, dict) for value in configs.values()):
            raise ApiError(400, "bad_request", "configs maps a model's name or source to its config.json")
        try:
            inventory = devices.declared(declared) if declared is not None else None
        except InventoryError as error:
            raise ApiError(422, "bad_inventory", error.message, error.hint, exit_code=3) from error
        unfound = await self._look(self._plane.admission.asks(loaded.resources, configs))
        reviews = self._plane.admission.review(loaded.resources, inventory, configs, unfound)
        if inventory is None:
            self._foresee_address(reviews)
        self._warn_of_managers(reviews)
        await self._note_moved(reviews)
        after = self._plane.admission.together(reviews, inventory)
        return report(reviews) | {"room": after}

    def diff(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """In what these files differ from what is stored, field by field. Writes nothing and asks no hub."""
        return differences(self._plane.admission.differences(_load(body).resources))

    async def _look(self, asks: Sequence[Ask]) -> dict[Ask, SourceError]:
        """Ask the hub about what the cache does not know; what it refused, and why."""
        if self._plane.offline:
            return {}
        look = self._plane.downloads.look
        answers = await asyncio.gather(
            *(look(ask.repository, ask.revision, ask.part, dict(ask.auth) if ask.auth else None) for ask in asks)
        )
        return {ask: answer for ask, answer in zip(asks, answers, strict=True) if answer is not None}

    async def _note_moved(self, reviews: Sequence[Review]) -> None:
        """Say of models that stay at a commit where their branch is on the hub now."""
        pinned = self._plane.admission.pinned([review.located for review in reviews])
        if self._plane.offline:
            return
        questions = {
            asyncio.create_task(
                self._plane.downloads.moved_to(ask.repository, ask.revision, dict(ask.auth) if ask.auth else None)
            ): (review, ask, review.old.resolved["revision"])
            for review in reviews
            if (ask := pinned.get(review.key)) is not None and review.old is not None
        }
        if questions:
            _, late = await asyncio.wait(questions, timeout=MOVED_SECONDS)
            for question in late:
                question.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        for question, (review, ask, stays) in questions.items():
            now = None if question.cancelled() else question.result()
            if now is None:
                review.notes.append(f"the hub does not say where {ask.revision} of hf://{ask.repository} is now")
            elif now != stays:
                review.notes.append(
                    f"{ask.revision} of hf://{ask.repository} is at {now} on the hub by now; this model stays at "
                    f"{stays[:12]} until spec.revision names another"
                )

    def _warn_of_managers(self, reviews: Sequence[Review]) -> None:
        """Say in a plan what `_refuse_managed` would say to an apply."""
        for review in reviews:
            row = self._plane.store.inventory.manager(review.key)
            if row is not None and review.action == "update":
                text = f"managed by {row.owner}, from {row.file}: apply would be refused without --take-ownership"
                review.warnings.append(text)

    def _foresee_address(self, reviews: Sequence[Review]) -> None:
        """Say in a plan what `_check_address` would say to an apply."""
        own = next((review for review in reviews if review.key == GATEWAY), None)
        routed = (Model, Route, AccessPolicy)
        models = [review for review in reviews if isinstance(review.located.resource, routed)]
        if own is not None and own.refusal is not None:
            return
        problem = self._plane.gateway.conflict(
            own.resolved if own is not None else resolved_spec(self._plane.store.get(GATEWAY))
        )
        if problem is None:
            return
        if own is not None:
            own.refuse(Refusal("spec.port", "AddressInUse", problem, "choose another, or 0 for any"))
        elif models:
            models[0].warnings.append(f"the router cannot listen: {problem}; apply would be refused")

    async def apply(self, body: Mapping[str, Any], traceparent: str | None = None) -> dict[str, Any]:
        """Store these files' resources, all or none, and set the reconcilers to work. Ends a `down`.

        `traceparent` is remembered with the objects as the origin of their new generation. With `planned`, the
        items of a plan that was kept, it is refused if anything of them would be otherwise now.
        """
        self._plane.refuse_while_going_down()
        loaded = _load(body)
        async with self._plane.cache_turn:
            reviews = await self._reviewed(loaded.resources)
            if body.get("takeOwnership") is not True:
                self._refuse_managed([review.key for review in reviews if review.action != "unchanged"])
            self._refuse_moved(body.get("planned"), reviews)
            try:
                applied = self._plane.store.apply(self._plane.admission.changes(reviews), traceparent)
            except Conflict as conflict:
                raise ApiError(409, "conflict", conflict.message, conflict.hint, exit_code=5) from conflict
        self._set_to_work(reviews, applied)
        await self._plane.rise()
        warnings = {review.key: review.warnings for review in reviews}
        return {
            "results": [
                {
                    "key": str(item.key),
                    "result": item.result,
                    "generation": item.generation,
                    "revision": item.revision,
                    "warnings": warnings[item.key],
                }
                for item in applied
            ]
        }

    async def _reviewed(
        self, resources: Sequence[Located], cause: str = "", leaving: Sequence[Key] = ()
    ) -> list[Review]:
        """What storing these would do; the cache's turn is held. Raises `ApiError` where any of it is refused."""
        unfound = await self._look(self._plane.admission.asks(resources))
        self._plane.refuse_while_going_down()  # it may have begun meanwhile
        reviews = self._plane.admission.review(resources, unfound=unfound, cause=cause, leaving=leaving)
        if found := problems(reviews):
            raise invalid(found)
        self._check_address(reviews)
        return reviews

    async def put(
        self,
        resources: Sequence[Located],
        write: Sequence[Key],
        leaving: Sequence[Key],
        rows: Sequence[Managed],
        author: Author,
    ) -> tuple[Applied, ...]:
        """Apply on behalf of a git source: see `quire_operators.gitops.Hands`. It ends no `down`."""
        try:
            async with self._plane.cache_turn:
                reviews = await self._reviewed(resources, author.cause, leaving)
                by_key = {review.key: review for review in reviews}
                chosen = [by_key[key] for key in write]
                applied = self._plane.store.apply(self._plane.admission.changes(chosen), managed=rows)
        except ApiError as error:
            said = error.body["error"]
            found = [Problem(**each) for each in error.body.get("problems", ())]
            raise Rejected(said["message"], said["hint"] or "", found) from error
        self._set_to_work(chosen, applied, author)
        return applied

    def take(self, key: Key, author: Author) -> None:
        """Delete on behalf of a git source."""
        try:
            self._delete(key, author=author)
        except ApiError as error:
            if error.status != 404:  # then it is gone already
                raise Rejected(error.body["error"]["message"], error.body["error"]["hint"] or "") from error

    def _refuse_managed(self, keys: Sequence[Key]) -> None:
        """Refuse to change by hand what a repository says."""
        for key in keys:
            if (row := self._plane.store.inventory.manager(key)) is None:
                continue
            source = self._plane.store.get(row.owner)
            heals = source is not None and source.resolved["sync"]["selfHeal"]
            text = f"{key} is managed by {row.owner}, from {row.file} at {row.commit[:12]}"
            undone = f" after platform source suspend {row.source_name}, which would undo it" if heals else ""
            hint = f"change it there; or --take-ownership{undone}"
            raise ApiError(409, "managed", text, hint, exit_code=5)

    def _set_to_work(
        self, reviews: Sequence[Review], applied: Sequence[Applied], author: Author | None = None
    ) -> None:
        """Have the reconcilers act by what was stored, and tell of it."""
        self._keep_in_memory(reviews)
        for item in applied:
            self._plane.wake(item.key)
        self._plane.wake(GATEWAY)
        self._plane.wake(ROUTES)
        for item in applied:
            if item.result != "unchanged":
                self._plane.refresh(item.key)
                text = f"generation {item.generation}" + (f", revision {item.revision}" if item.revision else "")
                text += f", by {author} ({author.commit.subject})" if author is not None else ""
                self._plane.note(item.key, item.result.capitalize(), text)
        if author is None:
            self._plane.wake_sources()

    def _keep_in_memory(self, reviews: Sequence[Review]) -> None:
        """A model that serves and comes to be on demand stays in memory until somebody needs its room."""
        for review in reviews:
            old = review.old
            if old is None or is_on_demand(old.resolved) or not is_on_demand(review.resolved):
                continue
            if self._plane.store.replicas(review.key.name):
                resident = Override(Kind.RESIDENT, "platform", self._plane.store.clock(), "it served already")
                self._plane.store.set_override(old.uid, resident)

    @staticmethod
    def _refuse_moved(planned: object, reviews: Sequence[Review]) -> None:
        """Refuse to apply a plan that no longer says what would happen."""
        if planned is None:
            return
        if not isinstance(planned, list) or not all(isinstance(item, dict) and "key" in item for item in planned):
            raise ApiError(400, "bad_request", "planned is the list of items that a plan answered with")
        if (why := moved(planned, report(reviews)["items"])) is not None:
            hint = "plan again and look at it: platform plan FILE... --save PLAN"
            raise ApiError(409, "conflict", f"the plan no longer holds: {why}", hint, exit_code=5)

    def _check_address(self, reviews: Sequence[Review]) -> None:
        """Refuse an apply whose router could not listen, while a person is there to read it."""
        own = next((review for review in reviews if review.key == GATEWAY), None)
        needed = own is not None or any(
            isinstance(review.located.resource, Model | Route | AccessPolicy) for review in reviews
        )
        if not needed:
            return
        spec = own.resolved if own is not None else resolved_spec(self._plane.store.get(GATEWAY))
        problem = self._plane.gateway.conflict(spec)
        if problem is None:
            return
        place = ""
        if own is not None:
            at = own.located.problem("spec.port", "", "")
            place = f"{at.file}:{at.line}:{at.col}: {at.path}: "
        raise address_in_use(f"{place}the router cannot listen: {problem}", OTHER_PORT)

    async def up(self) -> dict[str, Any]:
        """Start again what was applied before a `down`. What is not down stays as it is."""
        self._plane.refuse_while_going_down()
        rose = await self._plane.rise()
        return {
            "results": [
                {
                    "key": str(stored.key),
                    "result": "starting" if rose else "unchanged",
                    "generation": stored.generation,
                    "revision": stored.revision,
                }
                for stored in self._plane.store.objects()
            ]
        }

    def delete(
        self, key: Key, traceparent: str | None = None, *, take: bool = False, prune: bool = False
    ) -> dict[str, Any]:
        """Begin a deletion; the object stays until nothing of it runs. `take`: also of one that a git source
        has. `prune`: of a source that deletes its objects with it, also of more of them than its cap."""
        self._plane.refuse_while_going_down()
        if not take and not self._plane.sources.has_left(key):
            self._refuse_managed([key])
        departing = self._departure(key, prune=prune)
        warnings = [text] if (text := self._last_policy(key)) is not None else []
        view = {**self._delete(key, traceparent), "warnings": warnings}
        self._plane.wake_sources()
        return {**view, "objects": departing} if departing is not None else view

    def _last_policy(self, key: Key) -> str | None:
        """What it means that an access policy goes; None of another object, and while there are others."""
        stored = self._plane.store.get(key) if key.kind == POLICY else None
        policies = self._plane.store.objects(POLICY)
        if (
            stored is None
            or stored.deletion_time is not None
            or any(each.deletion_time is None and each.key != key for each in policies)
        ):
            return None
        bind = resolved_spec(self._plane.store.get(GATEWAY))["bind"]
        if is_loopback(bind):
            return "it was the last AccessPolicy: without one the API needs no key, for whoever is on this machine"
        return f"it was the last AccessPolicy: others can reach {bind}, and every request gets 401 without one"

    def _departure(self, key: Key, *, prune: bool) -> dict[str, Any] | None:
        """What becomes of the objects of a source that is about to be deleted; None of anything else. Raises
        `ApiError` where it would be half done, or more than anybody said."""
        stored = self._plane.store.get(key) if key.kind == SOURCE else None
        if stored is None:
            return None
        departing = self._plane.sources.departure(stored)
        names = ", ".join(map(str, departing.take))
        if stored.deletion_time is None and departing.blocked is not None and not prune:
            raise ApiError(
                409,
                "prune_blocked",
                f"{key} has spec.deletionPolicy: Delete: {departing.blocked}: {names}",
                f"platform delete {key} --prune deletes them, too; with spec.deletionPolicy: Orphan they stay",
                exit_code=5,
            )
        if GATEWAY in departing.take:
            self._refuse_without_way_back()
        return {
            "deleted": [str(each) for each in (*departing.take, *departing.going)],
            "stay": {str(each): why for each, why in departing.stay.items()},
        }

    def _delete(self, key: Key, traceparent: str | None = None, author: Author | None = None) -> dict[str, Any]:
        if key == GATEWAY:
            self._refuse_without_way_back()
        last = self._last_policy(key)
        try:
            stored = self._plane.store.mark_deleting(key, traceparent)
        except NotFound as error:
            raise not_found(key) from error
        view = self._views.of(stored)
        by = f", by {author} ({author.commit.subject})" if author is not None else ""
        self._plane.note(key, "Deleting", f"generation {stored.generation}{by}")
        if last is not None:
            self._plane.note(GATEWAY, Reason.NO_ACCESS_POLICY, f"{key} is deleted: {last}", "Warning")
        if self._plane.is_down and all(seen.life is Life.GONE for seen in self._plane.fleet.observed()):
            self._plane.note(key, "Deleted", "nothing of it ran: the platform is down")
            for row in self._plane.store.replicas(key.name) if key.kind == "model" else ():
                self._plane.store.delete_replica(row)
            if key.kind == SOURCE:
                self._plane.sources.let_go(stored)
            else:
                self._plane.store.remove(key)
        self._plane.wake(key)
        self._plane.wake(ROUTES)
        self._plane.wake_routes()
        return view

    def _refuse_without_way_back(self) -> None:
        """Refuse to delete the gateway where the router could not go on without it."""
        if (problem := self._no_way_back()) is not None:
            raise address_in_use(
                f"without it the router would move to its default address, where it cannot listen: {problem}",
                "keep it, or stop the program that holds the address first; nothing was changed",
            )

    def _no_way_back(self) -> str | None:
        """Why the router could not listen where it does without a manifest; None when it could, or need not."""
        stored = self._plane.store.get(GATEWAY)
        if stored is None or stored.deletion_time is not None:
            return None
        if self._plane.gateway.current() is None and not self._plane.store.objects("model"):
            return None
        return self._plane.gateway.conflict(resolved_spec(None))


def _load(body: Mapping[str, Any]) -> manifest.Manifest:
    """The resources of a request's files. Raises `ApiError` for a wrong request or problems in the files."""
    files = body.get("files")
    if not isinstance(files, list) or not all(
        isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("text"), str)
        for item in files
    ):
        raise ApiError(400, "bad_request", 'files is a list of {"name", "text"}')
    loaded = manifest.load([(item["name"], item["text"]) for item in files])
    if loaded.problems:
        raise invalid(loaded.problems)
    return loaded
