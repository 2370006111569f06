"""What an apply would do, decided before anything is written. `plan` prints it, `apply` stores it.

`review` takes the parsed resources and answers with one `Review` each: the resolved spec, the revision if a new
one is needed, the differences, the arithmetic of the fit, how the change would roll out, or why it is refused.
`changes` turns reviews into what the store writes. Neither writes anything; reading checkpoint headers and chat
templates (`chat_template.py`) is the only I/O. What a review is and how it is shown: `review.py`. What fits on the
machine now: `room.py`. What objects are to one another: `company.py`.

When does a model need a new revision? When the hash over its rolling fields changed, when the file of its chat
template or the folder of an adapter holds something else, or when a hot value lies above what its engines
allocated for. A revision keeps the text of its template: going back to it goes back to that text. A revision of
the kept history that the spec fits is taken up again with the figures that were frozen in it: a revert in the
middle of a rollout finds its old replicas still current.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from quire_operators import adapters as adapter_folders
from quire_operators import chat_template as template_file
from quire_operators import company, room
from quire_operators.access import known_key
from quire_operators.cache import SPARE
from quire_operators.desired import Effective, effective, is_on_demand
from quire_operators.devices import Inventory, held
from quire_operators.gateway import tls_problem
from quire_operators.ledger import Waiter, beside_waiters
from quire_operators.overrides import Kind, Overrides, ended_by_intent, in_force
from quire_operators.placement import Placed, Placement, PlacementError, place
from quire_operators.records import Change, NewRevision, Revision, StoredObject
from quire_operators.review import Refusal, Review
from quire_operators.rollout import Row
from quire_operators.secrets import NO_SECRETS, Secrets
from quire_operators.sources import Located as Folder
from quire_operators.sources import NotLocal, SourceError, Sources
from quire_operators.store import Store
from quire_schemas import findings, wire
from quire_schemas.access import AccessPolicy
from quire_schemas.checkpoint import ModelProfile, names_dtype, profile_from_config, read_config, read_profile
from quire_schemas.checkpoint_files import CheckpointError, UnsupportedArchitecture, UnsupportedFeature
from quire_schemas.findings import TextFacts
from quire_schemas.hub import Part
from quire_schemas.manifest import Located, intent_hash
from quire_schemas.model import DEFAULTS_VERSION, Model, resolve_defaults
from quire_schemas.quantities import format_bytes
from quire_schemas.resource import Key
from quire_schemas.update import (
    FieldChange,
    UpdateClass,
    beyond_limits,
    diff,
    diff_metadata,
    diff_other,
    template_hash,
)

CAUSE_ANNOTATION = "quire.dev/change-cause"


@dataclass(frozen=True, slots=True)
class Ask:
    """A part of a repository at a revision that only its hub can tell of; `auth` is a secret's reference."""

    repository: str
    revision: str
    part: Part
    auth: tuple[tuple[str, str], ...] | None = None

    def is_about(self, error: NotLocal) -> bool:
        return (self.repository, self.revision, self.part) == (error.repository, error.revision, error.part)


def effective_template(placement: Placement) -> str:
    """The identity of an engine: its rolling fields, the bounds it allocates for, the text of a chat template that
    is a file of its own, and the contents of adapters."""
    parts = [placement.template, str(placement.max_num_seqs), str(placement.max_num_batched_tokens)]
    if placement.chat_template is not None:
        parts.append(placement.chat_template)
    parts += [f"{each.name}={each.digest}" for each in placement.adapters]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


ReadText = Callable[[Path, str | None], TextFacts | str]
"""Given a tokenizer's folder and a chat template or None: what is known of them, or why the router could not load
them.
"""


class Admission:
    """Reviews resources against the store, the sources and the machine."""

    def __init__(
        self,
        store: Store,
        sources: Sources,
        detect: Callable[[], Inventory],
        read_text: ReadText,
        waiters: Callable[[], Sequence[Waiter]] = tuple,
        secrets: Secrets = NO_SECRETS,
    ) -> None:
        """`waiters` are the models that wait for room now."""
        self._secrets = secrets
        self._store = store
        self._sources = sources
        self._detect = detect
        self._read_text = read_text
        self._waiters = waiters

    def review(
        self,
        resources: Sequence[Located],
        inventory: Inventory | None = None,
        configs: Mapping[str, Mapping[str, Any]] | None = None,
        unfound: Mapping[Ask, SourceError] | None = None,
        *,
        cause: str = "",
        leaving: Sequence[Key] = (),
    ) -> list[Review]:
        """One review a resource, in order. `cause` is what new revisions are for, where a manifest does not say
        it; objects that are `leaving` are deleted with this, and stand in nobody's way. `configs` (by model name
        or source) stand in for checkpoints that are not on this machine, so that a plan can be made without them.
        `unfound` is what the hub answered to those of `asks` that it refused."""
        here = inventory is None
        inventory = inventory or self._detect()
        reviews = [self._review(located, inventory, configs or {}, unfound or {}, cause) for located in resources]
        if here:
            self._check_disk(reviews)
        company.look(self._store, reviews, leaving, self._secrets)
        return reviews

    def together(self, reviews: Sequence[Review], inventory: Inventory | None = None) -> dict[str, Any]:
        """The proof of fit for the machine as a whole, with all models that are stored or reviewed on it; those
        that fit alone and not together get a note.
        """
        inventory = inventory or self._detect()
        claims, ours = self._claims(reviews, inventory), held(self._store.replicas())
        room.note_crowding(reviews, claims, inventory.cleared(ours))
        return room.devices_after(claims, inventory, ours)

    def changes(self, reviews: Sequence[Review]) -> list[Change]:
        """What the store is to write for reviews without a refusal."""
        return [
            Change(
                key=review.key,
                intent=review.located.intent,
                intent_hash=intent_hash(review.located.resource),
                resolved=review.resolved,
                expected=review.old.resource_version if review.old else None,
                revision=review.revision,
                keep_revisions=review.resolved.get("revisionHistoryLimit", 0),
            )
            for review in reviews
        ]

    def asks(
        self, resources: Sequence[Located], configs: Mapping[str, Mapping[str, Any]] | None = None
    ) -> list[Ask]:
        """What only a hub can tell before these resources can be reviewed; empty when all is on this machine."""
        found: dict[Ask, None] = {}
        for located in resources:
            old = self._store.get(located.key)
            if not isinstance(located.resource, Model):
                continue
            if self._action(located, old) == "unchanged":
                continue
            spec = resolve_defaults(located.resource)
            for look in (
                partial(self._locate, spec, old, located.key.name, configs or {}),
                partial(self._locate_tokenizer, spec, old),
            ):
                try:
                    look()
                except NotLocal as error:
                    auth = spec.get("sourceAuth")
                    key = tuple(sorted((k, v) for k, v in auth.items() if v is not None)) if auth else None
                    found[Ask(error.repository, error.revision, error.part, key)] = None
                except SourceError:
                    continue  # the review says it
        return list(found)

    def pinned(self, resources: Sequence[Located]) -> dict[Key, Ask]:
        """The branches and tags that existing models were resolved from, for whoever asks where they are now."""
        found = {}
        for located in resources:
            old = self._store.get(located.key)
            if old is None or not isinstance(located.resource, Model):
                continue
            spec = located.resource.spec
            if old.intent["spec"]["source"] != spec.source or not spec.source.startswith("hf://"):
                continue
            revision = spec.revision or "main"
            if not old.resolved["revision"].startswith(revision):
                auth = old.resolved.get("sourceAuth")
                key = tuple(sorted((k, v) for k, v in auth.items() if v is not None)) if auth else None
                found[located.key] = Ask(spec.source.removeprefix("hf://"), revision, "model", key)
        return found

    def differences(self, resources: Sequence[Located]) -> list[Review]:
        """Reviews of no more than what differs from what is stored: nothing is resolved, and no hub is asked."""
        found = []
        for located in resources:
            old = self._store.get(located.key)
            review = Review(located, old, self._action(located, old))
            found.append(review)
            if old is None or review.action == "unchanged":
                continue
            if isinstance(located.resource, Model):
                spec = resolve_defaults(located.resource)
                if _names_same_source(old, spec):
                    spec["revision"] = old.resolved["revision"]
                current = self._current(old)
                review.changes = tuple(
                    change
                    for change in _changes(located, old, spec, current)
                    if (change.path, change.new) != ("spec.revision", None)  # of another source, and not looked up
                )
                with contextlib.suppress(SourceError):  # what cannot be read is for apply and plan to refuse
                    review.changes += _content_changes(spec, current)
            else:
                spec = located.resource.model_dump(mode="json", by_alias=True)["spec"]
                review.changes = _changes(located, old, spec)
        return found

    # ── inside ────────────────────────────────────────────────────────────────────────────────────────────

    def _action(self, located: Located, old: StoredObject | None) -> str:
        """What applying would be. The same manifest is an update where the template's file or an adapter's folder
        that it names holds something else than the revision was made with; what cannot be read is for the review
        to refuse."""
        if old is None:
            return "create"
        if old.intent_hash != intent_hash(located.resource):
            return "update"
        if not isinstance(located.resource, Model):
            return "unchanged"
        try:
            return "update" if _content_changes(old.resolved, self._current(old)) else "unchanged"
        except SourceError:
            return "unchanged"

    def _current(self, old: StoredObject | None) -> Revision | None:
        """The revision that an object's last intent led to."""
        if old is None:
            return None
        return next((r for r in self._store.revisions(old.uid) if r.n == old.revision), None)

    def _review(
        self,
        located: Located,
        inventory: Inventory,
        configs: Mapping[str, Mapping[str, Any]],
        unfound: Mapping[Ask, SourceError],
        cause: str,
    ) -> Review:
        old = self._store.get(located.key)
        review = Review(located, old, self._action(located, old), cause=cause)
        if old is not None and old.deletion_time is not None:
            review.refuse(Refusal("", "Deleting", f"{located.key} is being deleted", "wait until it is gone"))
            return review
        if isinstance(located.resource, Model):
            try:
                self._review_model(review, located.resource, inventory, configs)
            except NotLocal as error:
                said = next((unfound[ask] for ask in unfound if ask.is_about(error)), error)
                path = error.path if said.path == "spec.source" else said.path
                review.refuse(Refusal(path, said.reason, said.message, said.hint))
            except SourceError as error:
                review.refuse(Refusal(error.path, error.reason, error.message, error.hint))
            except CheckpointError as error:
                unsupported = isinstance(error, UnsupportedArchitecture | UnsupportedFeature)
                reason = "UnsupportedArchitecture" if unsupported else "InvalidReference"
                review.refuse(Refusal("spec.source", reason, error.message, error.hint))
            except PlacementError as error:
                review.fit = error.fit
                # Of the fields whose change would make it fit, one that the manifest itself declares is to blame.
                offers = error.fit.counter_offers if error.fit is not None else ()
                path = next((offer.field for offer in offers if offer.field in located.places), error.path)
                review.refuse(Refusal(path, error.reason, error.message, error.hint))
        elif review.action == "unchanged" and old is not None:
            review.resolved = old.resolved
        else:
            spec = located.resource.model_dump(mode="json", by_alias=True)["spec"]
            review.resolved = spec
            review.changes = _changes(located, old, spec) if old is not None else ()
            if isinstance(located.resource, AccessPolicy):
                review.warnings += [
                    f"key {key.name} does not work: {key.problem}"
                    for key in (known_key(declared, self._secrets) for declared in spec["keys"])
                    if key.problem
                ]
            if spec.get("tls") is not None and (found := tls_problem(spec["tls"])) is not None:
                field, text = found
                hint = "give PEM files that this user may read: a certificate chain, its key without a password"
                review.refuse(Refusal(f"spec.tls.{field}", "InvalidReference", text, hint))
        return review

    def _review_model(
        self, review: Review, model: Model, inventory: Inventory, configs: Mapping[str, Mapping[str, Any]]
    ) -> None:
        old = review.old
        spec = resolve_defaults(model)
        name = review.key.name
        history = self._store.revisions(old.uid) if old is not None else ()
        current = self._current(old)
        chat_template = template_file.read(spec)
        if review.action == "unchanged" and old is not None and current is not None:
            # What is stored stays exactly as it was frozen; only the machine is looked at again.
            review.resolved = old.resolved
            review.placement = Placement.from_dict(current.placement)
            return
        folder = self._locate(spec, old, name, configs)
        if folder is not None and folder.commit is not None:
            spec["revision"] = folder.commit
        review.resolved = spec
        adapters = adapter_folders.read(spec)
        known = self._known_revision(spec, chat_template, adapters, current, history)
        if old is not None:
            review.changes = _changes(review.located, old, spec, current) + _content_changes(spec, current)
            self._refuse_immutable(review)
        if known is not None:
            review.placement = Placement.from_dict(known.placement)
            if current is None or known.n != current.n:
                review.revision = self._new(review, known.template_hash, review.placement, known.defaults_version)
                review.notes.append(f"takes up revision {known.n} again, with what was resolved then")
        else:
            placed = self._place(review, name, spec, folder, inventory, configs, chat_template, adapters)
            review.placement, review.fit = placed.placement, placed.fit
            review.notes += placed.notes
            identity = effective_template(placed.placement)
            review.revision = self._new(review, identity, placed.placement, DEFAULTS_VERSION)
        wanted = self._foreseen(review, spec, history)

        def kept(taken: Mapping[str, int]) -> Mapping[str, int]:
            return beside_waiters(wanted, self._waiters(), inventory, taken)

        if review.refusal is None:
            room.count_replicas(review, review.placement, self._rows_that_stay(), inventory, kept)
        if review.refusal is None:
            review.wanted = wanted
            review.rollout = room.rollout_text(review, wanted, current, self._store.replicas(), inventory, kept)

    def _claims(self, reviews: Sequence[Review], inventory: Inventory) -> list[room.Claim]:
        """What every model is to have once these are applied: as reviewed, or else as it is stored."""
        now = self._store.clock()
        changed = {
            review.key: (review, review.wanted)
            for review in reviews
            if review.refusal is None and review.wanted is not None
        }
        claims = []
        for stored in self._store.objects("model"):
            if stored.deletion_time is None and stored.key not in changed:
                history, decided = self._store.revisions(stored.uid), self._store.overrides(stored.uid)
                rows = self._store.replicas(stored.key.name)
                claims.append(room.claim(effective(stored, history, decided, now), rows, inventory))
        return claims + [
            room.claim(wanted, self._store.replicas(key.name), inventory, review)
            for key, (review, wanted) in changed.items()
        ]

    def _rows_that_stay(self) -> list[Row]:
        """Replicas but those of models on demand, which leave when there is need."""
        guests = {each.key.name for each in self._store.objects("model") if is_on_demand(each.resolved)}
        return [row for row in self._store.replicas() if row.model not in guests]

    def _foreseen(self, review: Review, spec: dict[str, Any], history: Sequence[Revision]) -> Effective:
        """What will be to run once this is applied, with what stays of what was decided beside the intent; notes
        on what does not."""
        old, now = review.old, self._store.clock()
        if old is None:
            old = StoredObject(review.key, "", 0, 0, {}, "", {}, None, now, now)
        n = old.revision or 0
        if review.revision is not None and review.placement is not None:
            n = max((revision.n for revision in history), default=0) + 1
            new = Revision(
                old.uid, n, review.revision.template_hash, spec, review.revision.defaults_version,
                review.placement.as_dict(), review.revision.cause, now,
            )  # fmt: skip
            history = (new, *history)
        else:
            history = [replace(each, resolved=spec) if each.n == n else each for each in history]
        decided = in_force(self._store.overrides(old.uid), now)
        ended = [kind for kind in ended_by_intent(old.resolved, spec) if kind in decided]
        review.ends = tuple(kind.value for kind in ended)
        stays = [override for kind, override in decided.items() if kind not in ended]
        review.notes += _decision_notes(old.key, decided, ended)
        return effective(replace(old, resolved=spec, revision=n), history, stays, now)

    def _new(self, review: Review, template: str, placement: Placement, defaults: int) -> NewRevision:
        annotations = review.located.intent.get("metadata", {}).get("annotations", {})
        declared = str(annotations.get(CAUSE_ANNOTATION, ""))
        cause = declared or review.cause or ("created" if review.old is None else "updated")
        return NewRevision(template, defaults, placement.as_dict(), cause)

    def _locate(
        self,
        spec: Mapping[str, Any],
        old: StoredObject | None,
        name: str,
        configs: Mapping[str, Mapping[str, Any]],
    ) -> Folder | None:
        """The checkpoint's folder; None when a config stands in for it.

        While the source and revision are written as before, a branch stays at the commit that was recorded.
        """
        if name in configs or spec["source"] in configs:
            return None
        revision = spec["revision"]
        if old is not None and _names_same_source(old, spec):
            revision = old.resolved["revision"]
        return self._sources.locate(spec["source"], revision)

    def _locate_tokenizer(self, spec: Mapping[str, Any], old: StoredObject | None) -> Folder | None:
        """The tokenizer's folder, if it has a source of its own; at the commit that was recorded before."""
        source, revision = spec["tokenizer"]["source"], None
        if source is None:
            return None
        if old is not None and old.resolved["tokenizer"]["source"] == source and source.startswith("hf://"):
            current = next((r for r in self._store.revisions(old.uid) if r.n == old.revision), None)
            revision = Path(current.placement["tokenizer_dir"]).name if current is not None else None
        try:
            return self._sources.locate(source, revision, "tokenizer")
        except SourceError as error:
            error.path = "spec.tokenizer.source"
            raise

    @staticmethod
    def _known_revision(
        spec: Mapping[str, Any],
        chat_template: str | None,
        adapters: tuple[wire.Adapter, ...],
        current: Revision | None,
        history: Sequence[Revision],
    ) -> Revision | None:
        """A revision that can serve `spec` with this chat template and these adapters as it is: the current one if
        it can, else the newest."""
        wanted = template_hash(spec)
        for revision in [*([current] if current is not None else []), *history]:
            placement = Placement.from_dict(revision.placement)
            if placement.template != wanted or beyond_limits(spec, placement.limits()):
                continue
            if placement.adapters != adapters:
                continue
            # one of a version that kept no template stays what it is, and is not come back to
            if placement.chat_template == chat_template or (
                placement.chat_template is None and revision is current
            ):
                return revision
        return None

    @staticmethod
    def _refuse_immutable(review: Review) -> None:
        for change in review.changes:
            if change.update is UpdateClass.IMMUTABLE:
                review.refuse(
                    Refusal(
                        change.path,
                        "Immutable",
                        f"{change.path} cannot change from {change.old} to {change.new} while the object exists",
                        f"recreate it: platform delete {review.key} && platform apply -f {review.located.file}",
                    )
                )

    def _place(
        self,
        review: Review,
        name: str,
        spec: Mapping[str, Any],
        folder: Folder | None,
        inventory: Inventory,
        configs: Mapping[str, Mapping[str, Any]],
        chat_template: str | None,
        adapters: tuple[wire.Adapter, ...],
    ) -> Placed:
        profile, model_dir = self._profile(name, spec, folder, configs)
        tokenizer_dir, facts = self._tokenizer(review, spec, model_dir, chat_template, standing_in=folder is None)
        if folder is not None and folder.missing:
            self._note_download(review, folder)
        rows = self._store.replicas()
        own = held(row for row in rows if row.model == name)
        commit = folder.commit if folder is not None else None
        placed = place(
            spec,
            profile,
            (model_dir, tokenizer_dir),
            commit,
            inventory,
            own,
            held(rows),
            template_hash(spec),
            chat_template,
            adapter_folders.profiles(spec, adapters, profile),
        )
        review.findings += findings.of_positions(profile, placed.placement.max_model_len)
        review.findings += findings.of_text(profile, facts) if facts is not None else []
        return placed

    @staticmethod
    def _profile(
        name: str, spec: Mapping[str, Any], folder: Folder | None, configs: Mapping[str, Mapping[str, Any]]
    ) -> tuple[ModelProfile, str]:
        if folder is None:
            config = configs[name] if name in configs else configs[spec["source"]]
            return profile_from_config(config), ""
        if spec["engine"]["runner"] == "scripted":
            return read_config(folder.folder), str(folder.folder)
        if not folder.missing:
            return read_profile(folder.folder), str(folder.folder)
        profile = read_config(folder.folder)
        if spec["engine"]["dtype"] == "auto" and not names_dtype(profile.raw):
            raise SourceError(
                "InvalidReference",
                "its config.json names no dtype, and the weights, which would show it, are not here yet",
                "declare spec.engine.dtype",
                "spec.engine.dtype",
            )
        return profile, str(folder.folder)

    def _note_download(self, review: Review, folder: Folder) -> None:
        review.download = folder.missing
        review.notes.append(
            f"downloads {format_bytes(folder.missing)} (commit {str(folder.commit)[:12]}) "
            f"into {self._sources.cache.root}"
        )

    def _tokenizer(
        self,
        review: Review,
        spec: Mapping[str, Any],
        model_dir: str,
        chat_template: str | None,
        *,
        standing_in: bool,
    ) -> tuple[str, TextFacts | None]:
        """The tokenizer's folder and what is known of it; its files are checked here, where a person is there to
        read the answer.
        """
        source = spec["tokenizer"]["source"]
        field = "spec.tokenizer.source" if source is not None else "spec.source"
        if source is None and standing_in:
            review.notes.append("planned from a configuration; the checkpoint itself was not looked at")
            return "", None
        located = self._locate_tokenizer(spec, review.old)
        folder = str(located.folder) if located is not None else model_dir
        if not (Path(folder) / "tokenizer.json").is_file():
            hint = "name a folder with a fast tokenizer in spec.tokenizer.source"
            review.refuse(Refusal(field, "NotFound", f"{folder} has no tokenizer.json", hint))
        if review.refusal is not None:
            return folder, None
        facts = self._read_text(Path(folder), chat_template)
        if isinstance(facts, TextFacts):
            return folder, facts
        if chat_template is not None and isinstance(self._read_text(Path(folder), None), TextFacts):
            text = f"{spec['tokenizer']['chatTemplateFile']}: {facts}"
            review.refuse(
                Refusal(template_file.FIELD, "ModelUnusable", text, "mend the template, or leave it out")
            )
            return folder, None
        hint = (
            "download the files again; or name a folder with a tokenizer in spec.tokenizer.source, "
            "or another template in spec.tokenizer.chatTemplateFile"
        )
        review.refuse(Refusal(field, "ModelUnusable", f"{folder}: {facts}", hint))
        return folder, None

    def _check_disk(self, reviews: Sequence[Review]) -> None:
        """Refuse downloads that the disk of the cache cannot hold, one after the other."""
        free = self._sources.cache.free()
        for review in reviews:
            if review.download and review.download + SPARE > free and review.refusal is None:
                text = (
                    f"{format_bytes(review.download)} are to be downloaded, and {self._sources.cache.root} has "
                    f"{format_bytes(max(free, 0))} free"
                )
                hint = "platform cache prune, or set HF_HUB_CACHE to a folder on a larger disk and platform down"
                review.refuse(Refusal("spec.source", "DiskFull", text, hint))
            free -= review.download


def _names_same_source(old: StoredObject, spec: Mapping[str, Any]) -> bool:
    """Whether source and revision are written as before: a branch then stays at the commit that was recorded."""
    written = old.intent["spec"]
    return (written["source"], written.get("revision")) == (spec["source"], spec["revision"])


def _changes(
    located: Located, old: StoredObject, spec: Mapping[str, Any], current: Revision | None = None
) -> tuple[FieldChange, ...]:
    """In what `spec` differs from the one that is stored, and what labels and annotations do."""
    metadata = old.intent.get("metadata", {}), located.intent.get("metadata", {})
    if not isinstance(located.resource, Model):
        return diff_other(type(located.resource), old.resolved, spec) + diff_metadata(*metadata)
    limits = Placement.from_dict(current.placement).limits() if current is not None else None
    return diff(old.resolved, spec, limits) + diff_metadata(*metadata)


def _content_changes(spec: Mapping[str, Any], current: Revision | None) -> tuple[FieldChange, ...]:
    """What differs in files and folders that have the names that they had. Raises `SourceError`."""
    return template_file.change(spec, current) + adapter_folders.changes(spec, current)


def _decision_notes(key: Key, decided: Overrides, ended: Sequence[Kind]) -> list[str]:
    """What becomes of decisions beside the intent when this is applied."""
    notes = []
    if Kind.PIN in ended:
        notes.append(f"ends the pin to revision {decided[Kind.PIN].revision}")
    if Kind.QUARANTINE in ended:
        given_up = decided[Kind.QUARANTINE]
        notes.append(
            f"revision {given_up.revision} was given up ({given_up.reason}); what is applied now is tried"
        )
    if (scale := decided.get(Kind.SCALE)) is not None:
        stays = f"it stays scaled to {scale.replicas}; platform scale {key} --reset ends that"
        notes.append(f"ends the scale to {scale.replicas}" if Kind.SCALE in ended else stays)
    if Kind.PAUSE in decided:
        notes.append(f"it is paused and stays so; platform resume {key} starts it")
    if Kind.HOLD in decided:
        notes.append(f"its rollouts are paused; platform rollout resume {key} lets this one begin")
    return notes
