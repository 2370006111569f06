"""What is told about an object: conditions, their reasons, a summary, progress, and what a person can do.

Pure: rows and observations in, a JSON document out. `Ready` (a request sent now is served) and `RolledOut`
(only the current revision runs, and all of it) are independent of each other; `Stalled` is bad when True:
nothing will change without a person. Every reason is a member of `Reason`, with its meaning and its remedies
beside it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

CRASH_LOOP_RESTARTS = 3
BAD_WHEN_TRUE = ("Stalled", "Drifted")
"""Conditions that are as wished when they are False."""


class Reason(enum.StrEnum):
    """Why a condition has the status it has."""

    # good
    VALID = "Valid"
    VERIFIED = "Verified"
    SCHEDULED = "Scheduled"
    SERVING = "Serving"
    UP_TO_DATE = "UpToDate"
    PROGRESS_MADE = "Progressing"
    STOPPED = "Stopped"
    PAUSED = "Paused"
    ON_DEMAND = "OnDemand"
    SCALED_TO_ZERO = "ScaledToZero"
    LISTENING = "Listening"
    NATIVE_KERNELS = "NativeKernels"
    ATTESTED = "Attested"
    ENFORCED = "Enforced"
    # not (yet)
    DOWNLOADING = "Downloading"
    HUB_UNREACHABLE = "HubUnreachable"
    FETCH_FAILED = "FetchFailed"
    STARTING = "Starting"
    NO_REPLICA_AVAILABLE = "NoReplicaAvailable"
    ENGINE_STALLED = "EngineStalled"
    HOT_UPDATE_PENDING = "HotUpdatePending"
    HELD = "RolloutPaused"
    PINNED = "Pinned"
    ROLLED_BACK = "RolledBack"
    CANARY = "CanaryProgressing"
    ROUTER_NOT_READY = "RouterNotReady"
    WORKERS_STARTING = "WorkersStarting"
    BACKEND_NOT_FOUND = "BackendNotFound"
    BACKEND_NOT_READY = "BackendNotReady"
    NO_WEIGHT = "NoWeight"
    NAME_CONFLICT = "NameConflict"
    DELETING = "Deleting"
    REFERENCE_KERNELS = "ReferenceKernels"
    # stuck
    INVALID_REFERENCE = "InvalidReference"
    NOT_FOUND = "NotFound"
    UNAUTHORIZED = "Unauthorized"
    SECRET_NOT_FOUND = "SecretNotFound"
    DISK_FULL = "DiskFull"
    CHECKSUM_MISMATCH = "ChecksumMismatch"
    UNSUPPORTED_ARCHITECTURE = "UnsupportedArchitecture"
    INSUFFICIENT_MEMORY = "InsufficientMemory"
    INSUFFICIENT_DEVICES = "InsufficientDevices"
    CRASH_LOOP = "CrashLoop"
    CONFIG_REJECTED = "ConfigRejected"
    OUT_OF_MEMORY = "OutOfMemory"
    MISSING_FILE = "MissingFile"
    MODEL_UNUSABLE = "ModelUnusable"
    PROGRESS_DEADLINE = "ProgressDeadlineExceeded"
    INCONCLUSIVE = "AnalysisInconclusive"
    CANARY_FAILED = "CanaryFailed"
    CANARY_DOWN = "CanaryDown"
    ADDRESS_IN_USE = "AddressInUse"
    ROUTER_FAILED = "RouterFailed"
    ROUTER_CRASH_LOOP = "RouterCrashLoop"
    EXPIRED = "Expired"
    NO_KEYS = "NoKeys"
    KEY_TAKEN = "KeyTaken"
    KEY_UNFIT = "KeyUnfit"
    NO_ACCESS_POLICY = "NoAccessPolicy"
    # of git
    SYNCED = "Synced"
    HEALTHY = "Healthy"
    UNHEALTHY = "Unhealthy"
    IN_STEP = "InStep"
    NOT_SYNCED = "NotSynced"
    SUSPENDED = "Suspended"
    WINDOW_CLOSED = "WindowClosed"
    REMOTE_UNREACHABLE = "RemoteUnreachable"
    GIT_MISSING = "GitMissing"
    REF_NOT_FOUND = "RefNotFound"
    PATH_NOT_FOUND = "PathNotFound"
    REPOSITORY_UNREADABLE = "RepositoryUnreadable"
    TOO_LARGE = "RepositoryTooLarge"
    VALIDATION_FAILED = "ValidationFailed"
    NO_MANIFESTS = "NoManifests"
    NOT_VERIFIED = "NotVerified"
    KUSTOMIZE_FAILED = "KustomizeFailed"
    MANUAL_CHANGE = "ManualChange"
    PRUNE_BLOCKED = "PruneBlocked"
    NO_PRICES = "NoPrices"
    BUDGET_LOW = "BudgetLow"
    BUDGET_SPENT = "BudgetSpent"


@dataclass(frozen=True, slots=True)
class Advice:
    """What a reason means, and what helps; `{key}` stands for the object."""

    meaning: str
    remedies: tuple[str, ...]


ADVICE: dict[Reason, Advice] = {
    Reason.DOWNLOADING: Advice(
        "Files of the source are on their way, or are verified before their first use.",
        ("platform describe {key}   how far it is, and how fast",),
    ),
    Reason.HUB_UNREACHABLE: Advice(
        "The hub does not answer, or the connection broke; it is tried again with growing pauses, and goes on "
        "where it stopped.",
        (
            "check the network, HTTPS_PROXY and HF_ENDPOINT; the control plane has those of the shell that "
            "started it: platform down, then apply again",
        ),
    ),
    Reason.FETCH_FAILED: Advice(
        "The download ended for a reason of this machine; it is tried again with growing pauses.",
        ("platform logs controlplane   what it said", "platform cache list   where the cache is"),
    ),
    Reason.NOT_SYNCED: Advice(
        "A commit is on its way: it is being fetched, checked or applied.", ("platform describe {key}",)
    ),
    Reason.UNHEALTHY: Advice(
        "The last commit is applied, and some of its objects do not serve by it yet. The source does not wait for "
        "them: the next commit is applied all the same.",
        ("platform get   which", "git revert COMMIT, and push"),
    ),
    Reason.SUSPENDED: Advice(
        "Somebody stopped the source, by spec.suspend or by platform source suspend: commits are seen and not "
        "applied, and changes by hand are not undone.",
        ("platform source resume {key}", "or spec.suspend: false"),
    ),
    Reason.WINDOW_CLOSED: Advice(
        "A commit is there, and spec.sync.windows do not let it be applied now. It is when they do.",
        ("wait, or change spec.sync.windows",),
    ),
    Reason.REMOTE_UNREACHABLE: Advice(
        "The repository cannot be reached. It is tried again with growing pauses; what was applied goes on as "
        "it is, "
        "and changes by hand are undone all the same where spec.sync.selfHeal says so.",
        (
            "check the network, spec.url, and HTTPS_PROXY of the control plane",
            "platform source sync {key}   tries now",
        ),
    ),
    Reason.GIT_MISSING: Advice(
        "Repositories are read by the git command, and the control plane does not find it in its PATH.",
        ("install git 2.34 or later, then platform daemon restart",),
    ),
    Reason.REF_NOT_FOUND: Advice(
        "The repository has no such branch, tag or commit. Nothing is changed for it.",
        ("push it, or change spec.ref",),
    ),
    Reason.PATH_NOT_FOUND: Advice(
        "The commit has no such folder. That is an error and never a commit without manifests: nothing is "
        "changed.",
        ("put the folder back, or change spec.path", "to have the objects deleted: platform delete, one by one"),
    ),
    Reason.REPOSITORY_UNREADABLE: Advice(
        "What was fetched cannot be read as a repository.", ("git fsck in the repository itself says more",)
    ),
    Reason.TOO_LARGE: Advice(
        "The repository is beyond a bound: 256 MiB for a commit, below spec.path 10,000 files and 4 MiB of "
        "manifests.",
        ("keep manifests in a repository, or a folder, of their own",),
    ),
    Reason.VALIDATION_FAILED: Advice(
        "A manifest of the commit cannot be applied, so nothing of the commit is. The place is file:line:col "
        "in the "
        "repository. It is tried again: the cause may lie on this machine.",
        ("mend it and push, or git revert COMMIT", "platform validate FOLDER   checks before a commit"),
    ),
    Reason.NO_MANIFESTS: Advice(
        "The commit has no manifest below spec.path. That is taken for a mistake: nothing is deleted.",
        ("put them back, or spec.sync.allowEmpty: true if there are to be none",),
    ),
    Reason.NOT_VERIFIED: Advice(
        "The commit bears no signature of a key in spec.verify.signedBy, so it is not applied.",
        ("sign it: git commit --amend -S, with gpg.format=ssh", "or add the key in spec.verify.signedBy"),
    ),
    Reason.KUSTOMIZE_FAILED: Advice(
        "spec.path has a kustomization, and it cannot be built: there is no kustomize or kubectl in the control "
        "plane's PATH, or it failed. A build sees the repository alone, never the network.",
        (
            "kustomize build FOLDER   in a checkout shows the same",
            "where there is no kustomize: kustomize build FOLDER | platform apply -f -",
        ),
    ),
    Reason.MANUAL_CHANGE: Advice(
        "Objects are not as the applied commit has them: somebody changed or deleted them by hand.",
        (
            "platform source sync {key}   makes them as in git",
            "or write in git what they are; selfHeal undoes it by itself",
        ),
    ),
    Reason.PRUNE_BLOCKED: Advice(
        "The commit leaves out more objects than spec.sync.maxPrune lets be deleted at once. None was; all "
        "else of it "
        "is applied.",
        ("put them back", "or platform delete them, or raise spec.sync.maxPrune"),
    ),
    Reason.UNAUTHORIZED: Advice(
        "The hub or the git server does not give the repository to this token, or no token was sent. It is "
        "tried again: "
        "a model every 5 minutes and at once after an apply that changes it, a source after its retryInterval.",
        (
            "accept the terms of a gated repository on its page, with the account that the token belongs to",
            "hf auth login, or platform secret set hf-token and spec.sourceAuth: {{secretRef: hf-token}}",
        ),
    ),
    Reason.SECRET_NOT_FOUND: Advice(
        "A reference (spec.sourceAuth of a model, spec.keys of an access policy) leads to no value. It is looked "
        "at again by itself: for a model every 5 minutes, for a policy every second.",
        ("platform secret list   which there are", "platform secret set NAME   keeps one"),
    ),
    Reason.DISK_FULL: Advice(
        "The files do not fit on the disk of the cache. It is looked at again every minute.",
        (
            "platform cache prune   removes what no model uses",
            "set HF_HUB_CACHE to a folder on a larger disk; platform down, then apply again",
        ),
    ),
    Reason.CHECKSUM_MISMATCH: Advice(
        "A file was fetched twice and had another digest than the hub names each time. It was removed.",
        (
            "look at the disk, and at what stands before the hub (HF_ENDPOINT, a proxy)",
            "change the manifest and apply it again: a new intent tries again",
        ),
    ),
    Reason.REFERENCE_KERNELS: Advice(
        "Answers are right, and slow: the kernels made for this device cannot be used.",
        (
            "platform doctor   what is in the way",
            "install a C++ compiler (g++ or clang++) if that is it: engines that start afterwards use it",
        ),
    ),
    Reason.STARTING: Advice(
        "Replicas load; requests are held for up to batching.maxQueueWait.",
        ("platform events --for {key} -w   follow what happens", "platform logs {key} -f   what the engine says"),
    ),
    Reason.NO_REPLICA_AVAILABLE: Advice(
        "No replica can answer now.",
        ("platform get replicas   which state each is in", "platform logs {key}   what the engine said last"),
    ),
    Reason.ENGINE_STALLED: Advice(
        "An engine completed no step for spec.probes.liveness.timeout; it was killed and is started again.",
        (
            "platform logs {key}   what it said last",
            "where a step may take longer, raise spec.probes.liveness.timeout; lower "
            "spec.batching.maxNumBatchedTokens makes steps shorter",
        ),
    ),
    Reason.HOT_UPDATE_PENDING: Advice(
        "A running engine has not yet confirmed a changed setting.",
        ("platform events --for {key}   whether it goes on",),
    ),
    Reason.PAUSED: Advice(
        "Somebody stopped the model for a while: it has no replicas, and requests for it are refused.",
        ("platform resume {key}   starts it again",),
    ),
    Reason.ON_DEMAND: Advice(
        "It is not in memory, and is loaded by the next request for it, which waits for that.",
        ("spec.residency: always keeps it in memory",),
    ),
    Reason.SCALED_TO_ZERO: Advice(
        "Nobody asked for it, so no replica of it runs. The next request starts one, and waits for that.",
        (
            "spec.autoscaling.minReplicas: 1 keeps one",
            "spec.autoscaling.idleTimeout says how long nobody has to ask",
        ),
    ),
    Reason.HELD: Advice(
        "Somebody paused the rollout: nothing is added or taken away, and replicas that crash are started again.",
        ("platform rollout resume {key}   lets it go on",),
    ),
    Reason.PINNED: Advice(
        "An earlier revision serves because somebody went back to it. The manifest was not changed by that.",
        (
            "change the manifest and apply it: a new intent ends the pin",
            "platform rollout retry {key}   ends the pin without a new intent",
        ),
    ),
    Reason.ROLLED_BACK: Advice(
        "The newest revision failed and was given up; an earlier one serves. Applying the same manifest again "
        "changes nothing.",
        (
            "platform logs {key}   what the failed engine said last",
            "correct the manifest and apply it: a new intent is tried",
            "platform rollout retry {key}   tries the same revision again, if the cause was outside it",
        ),
    ),
    Reason.CANARY: Advice(
        "A new revision serves a share of the requests beside the stable one, which keeps all its replicas. It "
        "goes on by itself, takes over after the last step, and is given up when it does worse.",
        (
            "platform rollout status {key}   its numbers beside those of the stable revision",
            "platform rollout promote {key}   has it take over now",
            "platform rollout abort {key}   gives it up",
        ),
    ),
    Reason.INCONCLUSIVE: Advice(
        "The time of a canary's step is over for rollout.progressDeadline, and it has had fewer requests than "
        "analysis.minRequests: it cannot be judged. It serves its share on, and goes on when they have come. Or "
        "its exam could not be held in that time: then it has no request yet, and begins when it has passed.",
        (
            "lower spec.rollout.canary.analysis.minRequests, or declare onInconclusive: Promote or Rollback",
            "platform rollout status {key}   for what an exam waits",
            "platform rollout promote {key}   has it take over without them; --skip-exam without an exam, too",
            "platform rollout abort {key}   gives it up",
        ),
    ),
    Reason.CANARY_FAILED: Advice(
        "A new revision failed as a canary, in its exam or at a gate. As rollout.autoRollback is false it is kept "
        "to be looked at, and has no requests; the stable revision serves.",
        (
            "platform rollout status {key}   why, and its numbers",
            "platform rollout abort {key}   gives it up; then rollout retry tries it once more",
            "platform rollout promote {key}   has it take over all the same; --skip-exam if it failed its exam",
        ),
    ),
    Reason.CANARY_DOWN: Advice(
        "The engine of a canary cannot start, or ends again and again. As rollout.autoRollback is false it is not "
        "given up. The stable revision serves; a canary that does not cannot be promoted.",
        (
            "platform logs {key}   what the engine said last",
            "correct the manifest and apply it: the new revision takes its place",
            "platform rollout retry {key}   starts its engine again at once, if the cause was outside it",
            "platform rollout abort {key}   gives it up",
        ),
    ),
    Reason.ROUTER_NOT_READY: Advice(
        "The router is not up, so no request can be routed.",
        ("platform logs router   why", "platform describe gateway/default   its address and state"),
    ),
    Reason.WORKERS_STARTING: Advice(
        "The router serves with fewer processes than its manifest asks for, and starts the others.",
        ("platform logs router   why, if it stays so",),
    ),
    Reason.BACKEND_NOT_FOUND: Advice(
        "A Route names a Model that does not exist. Its share goes to the others; where there are none, requests "
        "are refused.",
        ("apply a Model of that name, or change the Route", "platform get   which models there are"),
    ),
    Reason.BACKEND_NOT_READY: Advice(
        "No Model that the Route sends requests to can answer now; requests wait for one as the Models say.",
        ("platform get   which state each is in", "spec.fallbacks may name a model that stands in"),
    ),
    Reason.NO_WEIGHT: Advice(
        "All backends of the Route have weight 0: requests for its names are refused.",
        ("give a backend a weight above 0 and apply again",),
    ),
    Reason.NAME_CONFLICT: Advice(
        "A model name belongs to one object, with the headers that come with it; the older one keeps it.",
        ("take the name from one of them and apply again", "platform get routes   which names each has"),
    ),
    Reason.INVALID_REFERENCE: Advice(
        "The source is written in a way that leads nowhere.", ("correct spec.source and apply again",)
    ),
    Reason.NOT_FOUND: Advice(
        "The source is neither on this machine nor on its hub, or a git source's repository is not on its "
        "server. A hub "
        "is asked again every 5 minutes.",
        ("correct spec.source or spec.revision, or spec.url of a git source, and apply again",),
    ),
    Reason.UNSUPPORTED_ARCHITECTURE: Advice(
        "This version cannot run the checkpoint.", ("choose a checkpoint of a supported architecture",)
    ),
    Reason.INSUFFICIENT_MEMORY: Advice(
        "A replica is missing and its memory does not fit beside what is held already.",
        (
            "lower spec.engine.maxModelLen, spec.engine.kvCache.size or spec.batching.maxNumSeqs",
            "lower spec.replicas here or on another model, or delete a model: platform get",
            "spec.rollout.strategy: Recreate or Auto replaces without room for two",
        ),
    ),
    Reason.INSUFFICIENT_DEVICES: Advice(
        "A replica needs a GPU and none is free.",
        (
            "lower spec.replicas here or on another model, or delete a model: platform get",
            "spec.engine.device: cpu runs it without a GPU",
        ),
    ),
    Reason.CRASH_LOOP: Advice(
        "The engine ended unexpectedly several times; it is tried again with growing pauses.",
        (
            "platform logs {key}   what the engine said last",
            "change the manifest and apply it again: a new intent always supersedes",
        ),
    ),
    Reason.CONFIG_REJECTED: Advice(
        "The engine refused what it was told; trying again would change nothing.",
        (
            "platform logs {key}   what it refused",
            "change the manifest and apply it again: a new intent always supersedes",
        ),
    ),
    Reason.OUT_OF_MEMORY: Advice(
        "The engine ran out of memory twice, although its plan fits: something else holds the memory.",
        (
            "lower spec.engine.maxModelLen, spec.engine.kvCache.size or spec.batching.maxNumSeqs, and apply again",
            "end what else holds memory, then apply any change: a new intent always supersedes",
        ),
    ),
    Reason.MISSING_FILE: Advice(
        "A file of the checkpoint was there when the manifest was applied and is gone; it is looked for again by "
        "itself.",
        ("put the checkpoint back where spec.source says", "or correct spec.source and apply again"),
    ),
    Reason.MODEL_UNUSABLE: Advice(
        "The router cannot load the tokenizer or the chat template of the checkpoint: no request can be served.",
        (
            "platform logs router   what is wrong with the files",
            "declare a folder with whole files as spec.source or spec.tokenizer.source, or another template as "
            "spec.tokenizer.chatTemplateFile, and apply again",
        ),
    ),
    Reason.PROGRESS_DEADLINE: Advice(
        "The rollout made no progress for spec.rollout.progressDeadline.",
        (
            "platform get replicas   which replica does not get on",
            "platform logs {key}   what the engine said last",
        ),
    ),
    Reason.ADDRESS_IN_USE: Advice(
        "Another program listens on the gateway's address.",
        (
            "apply a Gateway named default with another spec.port, or with port 0 for any free one",
            "or stop the program that holds the address; it is tried again by itself",
        ),
    ),
    Reason.EXPIRED: Advice(
        "spec.expiresAt has passed by this machine's clock: the keys of the policy open nothing any more.",
        ("apply it with a later spec.expiresAt, or without one", "platform delete {key}"),
    ),
    Reason.NO_KEYS: Advice(
        "No key of the policy works, so nobody can use it; others are kept out all the same.",
        ("platform key create NAME   makes one, and prints its line for spec.keys",),
    ),
    Reason.KEY_TAKEN: Advice(
        "Two entries have the same key, and it can be one's alone: that of the older policy has it.",
        ("remove it from one of them", "platform key create NAME   makes another"),
    ),
    Reason.KEY_UNFIT: Advice(
        "The value of a key can be guessed, or cannot stand in a header.",
        ("platform key create NAME   makes one of 256 random bits",),
    ),
    Reason.NO_PRICES: Advice(
        "The policy has a budget of money, and may ask Models that have no prices: what they do costs nothing.",
        ("declare spec.prices of the Models", "leave them out of spec.allow.models"),
    ),
    Reason.BUDGET_LOW: Advice(
        "More of a budget is spent than its warnAt says.", ("platform usage   tells how much, and when it is new",)
    ),
    Reason.BUDGET_SPENT: Advice(
        "A budget is spent: requests that it is for get 429 insufficient_quota until its time is over.",
        ("platform usage   tells how much, and when it is new", "apply the policy with a larger budget"),
    ),
    Reason.NO_ACCESS_POLICY: Advice(
        "Other machines can reach the router, and nobody has a key: every request is answered with 401.",
        ("apply an AccessPolicy: platform key create NAME makes a key for it", "bind a loopback address"),
    ),
    Reason.ROUTER_FAILED: Advice(
        "A router refuses to start: there is none, or the one before it serves on.",
        ("platform logs router   why", "mend what it says, or apply a Gateway with other settings"),
    ),
    Reason.ROUTER_CRASH_LOOP: Advice(
        "The router ended several times within a minute, and is started again each time. Replicas go on, and get "
        "requests only while there is a router.",
        (
            "platform logs router   what it said last",
            "platform events --for gateway/default   how it ended, and how often",
        ),
    ),
}


def remedies(key: str, conditions: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a person can do about conditions that are not as wished, the gravest first; empty when all is well."""
    wrong = [c for c in conditions if c["type"] in BAD_WHEN_TRUE and c["status"] == "True"]
    wrong += [c for c in conditions if c["type"] not in BAD_WHEN_TRUE and c["status"] != "True"]
    found: list[str] = []
    for condition in wrong:
        advice = ADVICE.get(Reason(condition["reason"]))
        for line in advice.remedies if advice else ():
            if (text := line.format(key=key)) not in found:
                found.append(text)
    return found


def timestamp(at: float) -> str:
    """RFC 3339 in UTC, to the millisecond."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Fact:
    """One condition before it has a time."""

    type: str
    status: bool | None
    reason: Reason
    message: str = ""


def conditions(
    facts: Sequence[Fact], before: Sequence[Mapping[str, Any]], generation: int, now: float
) -> list[dict[str, Any]]:
    """Conditions as shown; the time of the last transition is kept while a status stays the same."""
    old = {condition["type"]: condition for condition in before}
    words = {True: "True", False: "False", None: "Unknown"}
    shown = []
    for fact in facts:
        was = old.get(fact.type)
        same = was is not None and was["status"] == words[fact.status]
        shown.append(
            {
                "type": fact.type,
                "status": words[fact.status],
                "reason": fact.reason.value,
                "message": fact.message,
                "lastTransitionTime": was["lastTransitionTime"] if was is not None and same else timestamp(now),
                "observedGeneration": generation,
            }
        )
    return shown


def summary(facts: Sequence[Fact], ready: int, want: int, updated: int, *, deleting: bool) -> str:
    """A few words for a table; may change at any time."""
    by_type = {fact.type: fact for fact in facts}
    if deleting:
        return "Deleting"
    if by_type["Stalled"].status:
        return f"Stalled: {by_type['Stalled'].reason}"
    if by_type["Ready"].reason is Reason.PAUSED:
        return "Paused"
    if by_type["Ready"].reason is Reason.ON_DEMAND:
        return "On demand"
    if by_type["Ready"].reason is Reason.SCALED_TO_ZERO:
        return "Scaled to zero"
    if want == 0 and by_type["Ready"].reason is Reason.INSUFFICIENT_MEMORY:
        return "Asked for, and no room"
    if want == 0:
        return "Stopped" if by_type["RolledOut"].status else "Stopping"
    if by_type["Fetched"].status is False:
        return f"{'Serving, ' if by_type['Ready'].status else ''}{by_type['Fetched'].reason}"
    away = by_type["RolledOut"].reason
    if away in (Reason.PINNED, Reason.ROLLED_BACK, Reason.HELD) and by_type["Ready"].status:
        return f"Serving, {_WORDS[away]}"
    if by_type["RolledOut"].status:
        return "Serving" if by_type["Ready"].status else by_type["Ready"].reason.value
    if ready and updated < want:
        return f"Updating {updated}/{want}"
    return "Serving, rolling out" if by_type["Ready"].status else f"Starting {ready}/{want}"


_WORDS = {Reason.PINNED: "pinned", Reason.ROLLED_BACK: "rolled back", Reason.HELD: "rollout paused"}
STAGES = ("accepted", "weights", "device", "loaded", "ready")


def progress(
    before: Mapping[str, Any] | None, generation: int, reached: Mapping[str, bool], seconds: float, **details: Any
) -> dict[str, Any]:
    """The five steps of this generation, each with the seconds from apply until it was first seen done.

    A step that was reached stays reached: a replica that restarts later does not take the time back. `details`
    are merged into the step they name.
    """
    same = before is not None and before.get("generation") == generation
    steps: dict[str, Any] = {"generation": generation}
    for stage in STAGES:
        old = before.get(stage) if same and before is not None else None
        if old is not None and old["ok"]:
            steps[stage] = {**old, **details.get(stage, {})}
        elif reached[stage]:
            steps[stage] = {"ok": True, "seconds": round(max(seconds, 0.0), 3), **details.get(stage, {})}
        else:
            steps[stage] = {"ok": False, "seconds": None, **details.get(stage, {})} if stage in details else None
    return steps
