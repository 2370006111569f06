"""What an apply would do, decided before anything is written. `plan` prints it, `apply` stores it.

`review` takes the parsed resources and answers with one `Review` each: the resolved spec, the revision if a new
one is needed, the differences, the arithmetic of the fit, how the change would roll out, or why it is refused.
`changes` turns reviews into what the store writes. Neither writes anything; reading checkpoint headers is the
only I/O.

When does a model need a new revision? When the hash over its rolling fields changed, or a hot value lies above
what its engines allocated for. A revision of the kept history that the spec fits is taken up again with the
figures that were frozen in it: a revert in the middle of a rollout finds its old replicas still current.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from quire_operators import rollout
from quire_operators.cache import SPARE
from quire_operators.devices import Inventory, device_names, free_places, held
from quire_operators.placement import Placed, Placement, PlacementError, place
from quire_operators.sources import Located as Folder
from quire_operators.sources import NotLocal, SourceError, Sources
from quire_operators.store import Change, NewRevision, Revision, Store, StoredObject
from quire_schemas.checkpoint import (
    CheckpointError,
    ModelProfile,
    UnsupportedArchitecture,
    UnsupportedFeature,
    names_dtype,
    profile_from_config,
    read_config,
    read_profile,
)
from quire_schemas.hub import Part
from quire_schemas.manifest import Located, Problem, intent_hash
from quire_schemas.model import DEFAULTS_VERSION, LivenessProbe, Model, resolve_defaults
from quire_schemas.quantities import format_bytes, format_duration, parse_duration, parse_percent
from quire_schemas.resource import Key
from quire_schemas.sizing import FitReport
from quire_schemas.update import (
    FieldChange,
    UpdateClass,
    beyond_limits,
    diff,
    diff_metadata,
    hot_hash,
    template_hash,
)

CAUSE_ANNOTATION = "quire.dev/change-cause"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a resource cannot be applied. `path` is the field it is about."""

    path: str
    reason: str
    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class Ask:
    """A part of a repository at a revision that only its hub can tell of; `auth` is a secret's reference."""

    repository: str
    revision: str
    part: Part
    auth: tuple[tuple[str, str], ...] | None = None

    def is_about(self, error: NotLocal) -> bool:
        return (self.repository, self.revision, self.part) == (error.repository, error.revision, error.part)


@dataclass(slots=True)
class Review:
    """What applying one resource would do."""

    located: Located
    old: StoredObject | None
    action: str
    resolved: dict[str, Any] = field(default_factory=dict)
    revision: NewRevision | None = None
    placement: Placement | None = None
    fit: FitReport | None = None
    changes: tuple[FieldChange, ...] = ()
    rollout: str = ""
    notes: list[str] = field(default_factory=list)
    download: int = 0
    """Bytes that are to be fetched from a hub."""
    warnings: list[str] = field(default_factory=list)
    """What goes against the wish, though it is accepted."""
    refusal: Refusal | None = None

    @property
    def key(self) -> Key:
        return self.located.key


def effective_template(template: str, max_num_seqs: int, max_num_batched_tokens: int) -> str:
    """The identity of an engine: its rolling fields and the bounds it allocates for."""
    return hashlib.sha256(f"{template}/{max_num_seqs}/{max_num_batched_tokens}".encode()).hexdigest()


def desired_of(stored: StoredObject, revision: Revision) -> rollout.Desired:
    """The planner's view of one stored model."""
    spec = stored.resolved
    return rollout.Desired(
        model=stored.key.name,
        generation=stored.generation,
        revision=revision.n,
        template_hash=revision.template_hash,
        replicas=spec["replicas"],
        deleting=stored.deletion_time is not None,
        **rollout_options(spec),
    )


def rollout_options(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs of a rollout in the planner's units."""
    ways = spec["rollout"]
    return {
        "strategy": rollout.Strategy(ways["strategy"]),
        "max_surge": ways["maxSurge"],
        "max_unavailable": ways["maxUnavailable"],
        "min_ready": parse_duration(ways["minReadyDuration"]),
        "drain_timeout": parse_duration(spec["drainTimeout"]),
        "startup_timeout": parse_duration(spec["probes"]["startup"]["timeout"]),
        "stall_timeout": stall_timeout(spec),
        "backoff_base": parse_duration(spec["restartPolicy"]["backoffBase"]),
        "backoff_max": parse_duration(spec["restartPolicy"]["backoffMax"]),
        "hot_hash": hot_hash(spec),
    }


def stall_timeout(spec: Mapping[str, Any]) -> float:
    """Seconds without a step after which an engine counts as stalled. A spec that was resolved by a version that
    had no such field has its default."""
    declared = spec["probes"]["liveness"] or LivenessProbe().model_dump(mode="json", by_alias=True)
    return parse_duration(declared["timeout"])


TextProblem = Callable[[Path, Path | None], str | None]
"""Given a tokenizer's folder and a chat template's file or None: why the router could not load them, or None."""


class Admission:
    """Reviews resources against the store, the sources and the machine."""

    def __init__(
        self, store: Store, sources: Sources, detect: Callable[[], Inventory], text_problem: TextProblem
    ) -> None:
        self._store = store
        self._sources = sources
        self._detect = detect
        self._text_problem = text_problem

    def review(
        self,
        resources: Sequence[Located],
        inventory: Inventory | None = None,
        configs: Mapping[str, Mapping[str, Any]] | None = None,
        unfound: Mapping[Ask, SourceError] | None = None,
    ) -> list[Review]:
        """One review a resource, in order. `configs` (by model name or source) stand in for checkpoints that are
        not on this machine, so that a plan can be made without them. `unfound` is what the hub answered to those
        of `asks` that it refused."""
        here = inventory is None
        inventory = inventory or self._detect()
        reviews = [self._review(located, inventory, configs or {}, unfound or {}) for located in resources]
        if here:
            self._check_disk(reviews)
        self._refuse_name_conflicts(reviews)
        self._note_crowding(reviews, inventory)
        return reviews

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
            if old is not None and old.intent_hash == intent_hash(located.resource):
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

    # ── inside ────────────────────────────────────────────────────────────────────────────────────────────

    def _review(
        self,
        located: Located,
        inventory: Inventory,
        configs: Mapping[str, Mapping[str, Any]],
        unfound: Mapping[Ask, SourceError],
    ) -> Review:
        old = self._store.get(located.key)
        unchanged = old is not None and old.intent_hash == intent_hash(located.resource)
        review = Review(located, old, "unchanged" if unchanged else "update" if old else "create")
        if old is not None and old.deletion_time is not None:
            self._refuse(
                review, Refusal("", "Deleting", f"{located.key} is being deleted", "wait until it is gone")
            )
            return review
        if isinstance(located.resource, Model):
            try:
                self._review_model(review, located.resource, inventory, configs)
            except NotLocal as error:
                said = next((unfound[ask] for ask in unfound if ask.is_about(error)), error)
                path = error.path if said.path == "spec.source" else said.path
                self._refuse(review, Refusal(path, said.reason, said.message, said.hint))
            except SourceError as error:
                self._refuse(review, Refusal(error.path, error.reason, error.message, error.hint))
            except CheckpointError as error:
                unsupported = isinstance(error, UnsupportedArchitecture | UnsupportedFeature)
                reason = "UnsupportedArchitecture" if unsupported else "InvalidReference"
                self._refuse(review, Refusal("spec.source", reason, error.message, error.hint))
            except PlacementError as error:
                review.fit = error.fit
                # Of the fields whose change would make it fit, one that the manifest itself declares is to blame.
                offers = error.fit.counter_offers if error.fit is not None else ()
                path = next((offer.field for offer in offers if offer.field in located.places), error.path)
                self._refuse(review, Refusal(path, error.reason, error.message, error.hint))
        elif unchanged and old is not None:
            review.resolved = old.resolved
        else:
            spec = located.resource.model_dump(mode="json", by_alias=True)["spec"]
            review.resolved = spec
            review.changes = _plain_changes(old.resolved if old else {}, spec)
        return review

    @staticmethod
    def _refuse(review: Review, refusal: Refusal) -> None:
        review.action = "refused"
        review.refusal = refusal

    def _review_model(
        self, review: Review, model: Model, inventory: Inventory, configs: Mapping[str, Mapping[str, Any]]
    ) -> None:
        old = review.old
        spec = resolve_defaults(model)
        name = review.key.name
        history = self._store.revisions(old.uid) if old is not None else ()
        current = next((r for r in history if old is not None and r.n == old.revision), None)
        if review.action == "unchanged" and old is not None and current is not None:
            # What is stored stays exactly as it was frozen; only the machine is looked at again.
            review.resolved = old.resolved
            review.placement = Placement.from_dict(current.placement)
            return
        folder = self._locate(spec, old, name, configs)
        if folder is not None and folder.commit is not None:
            spec["revision"] = folder.commit
        review.resolved = spec
        known = self._known_revision(spec, current, history)
        limits = Placement.from_dict(current.placement).limits() if current is not None else None
        if old is not None:
            review.changes = diff(old.resolved, spec, limits) + diff_metadata(
                old.intent.get("metadata", {}), review.located.intent.get("metadata", {})
            )
            self._refuse_immutable(review)
        if known is not None:
            review.placement = Placement.from_dict(known.placement)
            if current is None or known.n != current.n:
                review.revision = self._new(review, known.template_hash, review.placement, known.defaults_version)
                review.notes.append(f"takes up revision {known.n} again, with what was resolved then")
        else:
            placed = self._place(review, name, spec, folder, inventory, configs)
            review.placement, review.fit = placed.placement, placed.fit
            review.notes += placed.notes
            effective = effective_template(
                placed.placement.template, placed.placement.max_num_seqs, placed.placement.max_num_batched_tokens
            )
            review.revision = self._new(review, effective, placed.placement, DEFAULTS_VERSION)
        if review.refusal is None:
            self._count_replicas(review, review.placement, inventory)
        if review.refusal is None:
            review.rollout = self._rollout_text(review, spec, current, inventory)

    def _new(self, review: Review, template: str, placement: Placement, defaults: int) -> NewRevision:
        annotations = review.located.intent.get("metadata", {}).get("annotations", {})
        cause = str(annotations.get(CAUSE_ANNOTATION, "")) or ("created" if review.old is None else "updated")
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
        if old is not None:
            written = old.intent["spec"]
            if (written["source"], written.get("revision")) == (spec["source"], revision):
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
        spec: Mapping[str, Any], current: Revision | None, history: Sequence[Revision]
    ) -> Revision | None:
        """A revision whose engines can serve `spec` as they are: the current one if it can, else the newest."""
        wanted = template_hash(spec)
        for revision in [*([current] if current is not None else []), *history]:
            placement = Placement.from_dict(revision.placement)
            if placement.template == wanted and not beyond_limits(spec, placement.limits()):
                return revision
        return None

    @staticmethod
    def _refuse_immutable(review: Review) -> None:
        for change in review.changes:
            if change.update is UpdateClass.IMMUTABLE:
                key = review.key
                review.action = "refused"
                review.refusal = Refusal(
                    change.path,
                    "Immutable",
                    f"{change.path} cannot change from {change.old} to {change.new} while the object exists",
                    f"recreate it: platform delete {key} && platform apply -f {review.located.file}",
                )

    def _place(
        self,
        review: Review,
        name: str,
        spec: Mapping[str, Any],
        folder: Folder | None,
        inventory: Inventory,
        configs: Mapping[str, Mapping[str, Any]],
    ) -> Placed:
        profile, model_dir = self._profile(name, spec, folder, configs)
        tokenizer_dir = self._tokenizer(review, spec, model_dir, standing_in=folder is None)
        if folder is not None and folder.missing:
            self._note_download(review, folder)
        rows = self._store.replicas()
        own = held(row for row in rows if row.model == name)
        commit = folder.commit if folder is not None else None
        return place(
            spec, profile, (model_dir, tokenizer_dir), commit, inventory, own, held(rows), template_hash(spec)
        )

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

    def _tokenizer(self, review: Review, spec: Mapping[str, Any], model_dir: str, *, standing_in: bool) -> str:
        """The tokenizer's folder; its files are checked here, where a person is there to read the answer."""
        source = spec["tokenizer"]["source"]
        template = spec["tokenizer"]["chatTemplateFile"]
        if template is not None and not Path(template).is_file():
            self._refuse(
                review,
                Refusal(
                    "spec.tokenizer.chatTemplateFile",
                    "NotFound",
                    f"{template} is not a file",
                    "give the absolute path of a Jinja template",
                ),
            )
        if source is None and standing_in:
            review.notes.append("planned from a configuration; the checkpoint itself was not looked at")
            return ""
        located = self._locate_tokenizer(spec, review.old)
        folder = str(located.folder) if located is not None else model_dir
        if not (Path(folder) / "tokenizer.json").is_file():
            self._refuse(
                review,
                Refusal(
                    "spec.tokenizer.source" if source is not None else "spec.source",
                    "NotFound",
                    f"{folder} has no tokenizer.json",
                    "name a folder with a fast tokenizer in spec.tokenizer.source",
                ),
            )
        elif (
            review.refusal is None
            and (problem := self._text_problem(Path(folder), None if template is None else Path(template)))
            is not None
        ):
            self._refuse(
                review,
                Refusal(
                    "spec.tokenizer.source" if source is not None else "spec.source",
                    "ModelUnusable",
                    f"{folder}: {problem}",
                    "download the files again; or name a folder with a tokenizer in spec.tokenizer.source, "
                    "or another template in spec.tokenizer.chatTemplateFile",
                ),
            )
        return folder

    def _count_replicas(self, review: Review, placement: Placement, inventory: Inventory) -> None:
        """Refuse more replicas than this machine's share could ever hold; warn of more than it holds now."""
        spec = review.resolved
        want, memory = spec["replicas"], placement.memory
        share, device_ids = parse_percent(spec["engine"]["memory"]), spec["placement"]["deviceIds"]
        names = device_names(inventory, placement.device, device_ids)
        most = sum(int(inventory.total(name) * share) // memory for name in names)
        if 0 < most < want:
            whole = format_bytes(sum(int(inventory.total(name) * share) for name in names))
            self._refuse(
                review,
                Refusal(
                    "spec.replicas",
                    "InsufficientMemory" if placement.device == "cpu" else "InsufficientDevices",
                    f"{want} replicas of {format_bytes(memory)} each need {format_bytes(want * memory)}; "
                    f"this machine's share, even with nothing else on it, is {whole}",
                    f"at most {most} fit: set spec.replicas to {most} or less",
                ),
            )
            return
        others = [row for row in self._store.replicas() if row.model != review.key.name]
        now = len(free_places(inventory, held(others), placement.device, memory, share, device_ids))
        if now < want:
            holders: dict[str, int] = {}
            for row in others:
                if row.device in names and row.failed_generation is None:
                    holders[row.model] = holders.get(row.model, 0) + row.memory
            who = ", ".join(f"model/{name} holds {format_bytes(size)}" for name, size in sorted(holders.items()))
            review.warnings.append(
                f"{now} of {_count(want, 'replica')} fit{'s' if want == 1 else ''} now"
                + (f": {who}" if who else "")
                + "; the rest waits until there is room"
            )

    def _rollout_text(
        self, review: Review, spec: Mapping[str, Any], current: Revision | None, inventory: Inventory
    ) -> str:
        """How the change would be carried out now, by the very budget that the planner uses."""
        if review.placement is None:
            return ""
        rows = [row for row in self._store.replicas() if row.model == review.key.name]
        want = spec["replicas"]
        if review.revision is None:
            if want != len(rows):
                return f"{len(rows)} → {want} replicas; none restarts"
            return "no replica restarts"
        share = parse_percent(spec["engine"]["memory"])
        places = free_places(
            inventory,
            held(self._store.replicas()),
            review.placement.device,
            review.placement.memory,
            share,
            spec["placement"]["deviceIds"],
        )
        desired = rollout.Desired(
            model=review.key.name,
            generation=0,
            revision=0,
            template_hash=review.revision.template_hash,
            replicas=want,
            **rollout_options(spec),
        )
        budget = rollout.budget(desired, len(rows), len(places))
        if not rows:
            short = "" if len(places) >= want else f"; {len(places)} of them fit now"
            return f"{_count(want, 'replica')} to start{short}"
        if budget.strategy is rollout.Strategy.RECREATE:
            return f"Recreate: {_count(len(rows), 'replica')} stop first, then {want} start"
        text = f"RollingUpdate, surge {budget.surge}, unavailable {budget.unavailable}"
        if budget.stop_first:
            asked = spec["rollout"]
            text += f" (asked for {asked['maxSurge']}/{asked['maxUnavailable']}; nothing more fits)"
        elif budget.surge == 0 and budget.unavailable == 0:
            text += ": blocked, because nothing more fits and none may be taken away"
        each = current.load_seconds if current is not None else None
        if each is not None:
            text += f"\n{_count(want, 'replica')}, about {format_duration(each)} each"
        return text + f"; {budget.floor} of {want} serve meanwhile"

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
                self._refuse(review, Refusal("spec.source", "DiskFull", text, hint))
            free -= review.download

    def _refuse_name_conflicts(self, reviews: Sequence[Review]) -> None:
        """Two models may not claim one served name, whether stored or in this very set."""
        in_set = {review.key for review in reviews}
        owners: dict[str, Key] = {}
        for stored in self._store.objects("model"):
            if stored.key not in in_set and stored.deletion_time is None:
                owners.update(dict.fromkeys(stored.resolved["servedModelNames"], stored.key))
        for review in reviews:
            declared = review.located.intent.get("spec", {}).get("servedModelNames")
            for index, name in enumerate(review.resolved.get("servedModelNames", ())):
                owner = owners.setdefault(name, review.key)
                if owner != review.key and review.refusal is None:
                    self._refuse(
                        review,
                        Refusal(
                            f"spec.servedModelNames[{index}]" if declared else "metadata.name",
                            "NameConflict",
                            f"the model name {name!r} is already served by {owner}",
                            f"choose another name, or delete {owner} first",
                        ),
                    )

    def _note_crowding(self, reviews: Sequence[Review], inventory: Inventory) -> None:
        """Each model was reviewed as if it came alone: say so where together they do not fit this machine.

        Those that exist already come first, as they do when it is applied.
        """
        in_set = {review.key.name for review in reviews}
        taken = held(row for row in self._store.replicas() if row.model not in in_set)
        others = dict(taken)
        before: dict[str, list[str]] = {"cpu": [], "cuda": []}
        for review in sorted(reviews, key=lambda review: review.old is None):
            placement, spec = review.placement, review.resolved
            if review.refusal is not None or placement is None:
                continue
            fits = partial(
                free_places,
                inventory,
                kind=placement.device,
                need=placement.memory,
                share=parse_percent(spec["engine"]["memory"]),
                device_ids=spec["placement"]["deviceIds"],
            )
            want = spec["replicas"]
            places = fits(taken=taken)[:want]
            missing, neighbours = want - len(places), before[placement.device]
            if missing and neighbours and len(fits(taken=others)) >= want:
                reason = "InsufficientMemory" if placement.device == "cpu" else "InsufficientDevices"
                who = "it" if missing == want else f"{missing} of its {want} replicas"
                names = ", ".join(neighbours)
                review.notes.append(f"fits alone; together with {names} {who} will wait as {reason}")
            for device in places:
                taken[device] = taken.get(device, 0) + placement.memory
            if places:
                neighbours.append(str(review.key))


def _plain_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[FieldChange, ...]:
    """Differences of two flat-enough specs without update classes of their own (Gateway): all are rolling."""
    return tuple(
        FieldChange(f"spec.{name}", old.get(name), new.get(name), UpdateClass.ROLLING)
        for name in dict.fromkeys([*old, *new])
        if old and old.get(name) != new.get(name)
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def problems(reviews: Sequence[Review]) -> list[Problem]:
    """The refusals as problems of the files they come from."""
    return [
        review.located.problem(found.path, found.message, found.hint)
        for review in reviews
        if (found := review.refusal) is not None
    ]


def report(reviews: Sequence[Review]) -> dict[str, Any]:
    """The reviews as the document that `platform plan` prints."""
    items = []
    for review in reviews:
        old = review.old.revision if review.old is not None else None
        new = old if review.revision is None else (old or 0) + 1
        item: dict[str, Any] = {
            "key": str(review.key),
            "action": review.action,
            "revision": [old, new],
            "changes": [
                {
                    "path": change.path,
                    "old": change.old,
                    "new": change.new,
                    "update": change.update.value,
                    "note": change.note,
                }
                for change in review.changes
            ],
            "fit": _fit(review.fit) if review.fit is not None else None,
            "resolved": review.placement.resolved() if review.placement is not None else None,
            "rollout": review.rollout,
            "notes": review.notes,
            "warnings": review.warnings,
        }
        if (found := review.refusal) is not None:
            problem = review.located.problem(found.path, found.message, found.hint)
            item["problem"] = {**problem.as_dict(), "reason": found.reason}
        items.append(item)
    actions = [review.action for review in reviews]
    return {
        "items": items,
        "summary": {
            "create": actions.count("create"),
            "update": actions.count("update"),
            "delete": 0,
            "refused": actions.count("refused"),
        },
    }


def _fit(found: FitReport) -> dict[str, Any]:
    return {
        "fits": found.fits,
        "weights": found.weights,
        "activations": found.activations,
        "overhead": found.overhead,
        "kv": found.kv,
        "used": found.used,
        "limit": found.limit,
        "numBlocks": found.num_blocks,
        "kvTokens": found.kv_tokens,
        "maxModelLen": found.max_model_len,
        "reason": found.reason,
        "counterOffers": [str(offer) for offer in found.counter_offers],
        "lines": [line[9:] for line in found.lines()],  # the label is the printer's
    }
