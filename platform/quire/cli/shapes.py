"""The shapes of what commands print with `-o json` and `-o yaml`. `docs/reference/output.md` is made of this, and
tests hold what commands print to it, field by field.

Every answer begins with `apiVersion`. While that stays, fields are added, and none is removed or comes to mean
something else; a reader passes over those that it does not know. Bytes and token counts are whole numbers,
durations are seconds, times are RFC 3339 in UTC.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from typing_extensions import TypedDict  # of typing, Pydantic takes only that of Python 3.12

Key = Annotated[str, "An object's kind and name: `model/llama`."]
Time = Annotated[str, "RFC 3339, UTC."]


class Condition(TypedDict):
    """One thing that is so, is not, or is not known."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: Annotated[str, "A word: `platform explain reason/WORD`."]
    message: str
    lastTransitionTime: Annotated[Time, "When `status` last changed."]
    observedGeneration: Annotated[int, "The generation that it was found for."]


class Endpoints(TypedDict):
    """Where requests go."""

    openai: Annotated[str, "Base URL of the OpenAI API."]
    certificate: NotRequired[Annotated[str, "File of the certificate to trust, where the API speaks https."]]
    modelNames: NotRequired[Annotated[list[str], "Of a model: the names it is asked for by."]]
    unavailable: NotRequired[Annotated[str, "Why nothing answers there now."]]
    keys: NotRequired[Annotated[bool, "There, where requests need a key: there is an AccessPolicy."]]


class Gate(TypedDict):
    """A comparison of a canary with the stable revision."""

    name: str
    stable: Annotated[float | None, "A share, or seconds."]
    new: float | None
    limit: Annotated[
        float, "The most that `new` may be; where `relative`, the share that it may be above `stable`."
    ]
    relative: bool
    beyond: Annotated[bool, "It is above the limit; it may be so by chance."]


class CanaryStep(TypedDict):
    """A declared step."""

    weight: Annotated[int, "Percent of the requests."]
    hold: str


class Answered(TypedDict):
    """Requests that were compared."""

    stable: int
    new: int


class Exam(TypedDict):
    """What a canary is asked before it has any request."""

    state: Literal["Waits", "Passed", "Failed"]
    text: Annotated[str, "What came of it so far, and what it waits for."]
    against: Annotated[int, "The revision that it is compared with."]
    asked: NotRequired[Annotated[int, "While it waits: questions that were put."]]
    questions: NotRequired[int]


class GoingCanary(TypedDict):
    """A canary."""

    revision: int
    step: Annotated[int, "From 1; 0 before a replica of it serves."]
    steps: list[CanaryStep]
    requests: Annotated[int, "Of this step."]
    minRequests: int
    total: NotRequired[Answered]
    exam: NotRequired[Annotated[Exam, "Where smokePrompts or maxDrift are declared, once a replica serves."]]
    failure: NotRequired[Annotated[str, "Why it has failed, and is kept as `rollout.autoRollback` is false."]]
    gates: list[Gate]


class Going(TypedDict):
    """A model's rollout."""

    revision: Annotated[int, "The one that is to serve."]
    settled: Annotated[bool, "Nothing is left to do."]
    strategy: Literal["Auto", "RollingUpdate", "Recreate", "Canary"]
    held: Annotated[bool, "Rollouts are paused."]
    canary: NotRequired[Annotated[GoingCanary, "While a new revision is one."]]


class Counts(TypedDict):
    """Replicas of a model."""

    desired: int
    live: Annotated[int, "Processes that exist."]
    ready: Annotated[int, "Those that have served for `rollout.minReadyDuration`."]
    updated: Annotated[int, "Ready ones of the revision that is to serve."]
    draining: int


class Decision(TypedDict):
    """What was decided beside the manifest."""

    kind: Literal["scale", "autoscale", "pause", "hold", "pin", "quarantine", "restart", "resident", "suspend"]
    by: str
    reason: str
    since: Time
    until: NotRequired[Time]
    replicas: NotRequired[int]
    revision: NotRequired[int]


class Step(TypedDict):
    """One step from apply to the first answer."""

    ok: bool
    seconds: Annotated[float | None, "From apply until it was first seen done."]
    bytes: NotRequired[int]
    bytesDone: NotRequired[int]
    rate: NotRequired[Annotated[int, "Bytes a second."]]
    device: NotRequired[str]


class Steps(TypedDict):
    """The steps of one generation; null for one that has not begun."""

    generation: int
    accepted: Step | None
    weights: Step | None
    device: Step | None
    loaded: Step | None
    ready: Step | None


class PolicyKey(TypedDict):
    """One key of an AccessPolicy; never its value."""

    name: str
    id: Annotated[str, "The public part of a key that platform key create made; empty for any other."]
    source: Annotated[str, "Where it comes from: `hash`, `secretRef NAME`, `file PATH` or `env NAME`."]
    works: bool
    problem: str


class Workers(TypedDict):
    """Processes of the router."""

    wanted: int
    serving: Annotated[int, "Those that take requests now."]


class SourceObject(TypedDict):
    """One object of a GitSource."""

    key: Key
    file: Annotated[str, "In the repository."]
    commit: Annotated[str, "The one that last changed it."]


class Sync(TypedDict):
    """What became of one commit of a GitSource."""

    commit: str
    author: str
    subject: str
    at: Time
    result: Literal["Applied", "Healed", "Refused"]
    message: Annotated[str, "Why it was refused, or what of it was not done."]
    changed: Annotated[list[str], "Each object, and whether it was created, updated, adopted or deleted."]


class LowBudget(TypedDict):
    """A budget of an AccessPolicy that is spent, or nearly."""

    name: str
    key: Annotated[str, "Whose it is, where each key has one for itself; else empty."]
    unit: Literal["tokens", "cost"]
    size: Annotated[int | str, "Tokens; of money a decimal number, as text."]
    state: Literal["open", "warned", "spent"]
    resetsAt: Annotated[
        str | None,
        "When its day, week or month is over; where the last hours count, when it is open again: null if it is.",
    ]


class BudgetStanding(LowBudget):
    """How a budget of an AccessPolicy stands. Amounts are as in `size`."""

    policy: str
    spent: int | str
    left: int | str
    held: Annotated[int | str, "What requests that run now may still come to."]


class Status(TypedDict):
    """Where an object stands. Of other kinds than Model the fields of replicas and rollouts are absent."""

    observedGeneration: int
    summary: Annotated[str, "A few words for a table; may change at any time."]
    conditions: list[Condition]
    endpoints: NotRequired[Endpoints]
    keys: NotRequired[Annotated[list[PolicyKey], "Of an AccessPolicy."]]
    workers: NotRequired[Annotated[Workers, "Of the gateway."]]
    budgets: NotRequired[Annotated[list[LowBudget], "Of an AccessPolicy: those that are spent, or nearly."]]
    remedies: Annotated[list[str], "What you can do."]
    url: NotRequired[Annotated[str, "Of a GitSource, and so are the next ten."]]
    ref: NotRequired[str]
    head: NotRequired[Annotated[str | None, "The commit that the remote is at."]]
    looked: NotRequired[Annotated[float | None, "When the remote was last asked, by the control plane's clock."]]
    lastAppliedRevision: NotRequired[str | None]
    lastAttemptedRevision: NotRequired[str | None]
    objects: NotRequired[list[SourceObject]]
    kept: NotRequired[Annotated[list[Key], "Objects that left the repository and were not deleted."]]
    problems: NotRequired[Annotated[list[Problem], "Of the commit that is refused; the first 20."]]
    history: NotRequired[Annotated[list[Sync], "Newest first, the last ten."]]
    servedRevision: NotRequired[int | None]
    stableRevision: NotRequired[Annotated[int | None, "The last one that was rolled out as a whole."]]
    rollout: NotRequired[Going]
    overrides: NotRequired[list[Decision]]
    replicas: NotRequired[Counts]
    resolved: NotRequired[Annotated[dict[str, Any], "What `auto` became."]]
    progress: NotRequired[Steps]


class Ended(TypedDict):
    """How a process ended that nobody asked to."""

    reason: str
    message: str
    log: Annotated[list[str], "Its last lines."]


class Replica(TypedDict):
    """One replica of a model."""

    id: str
    revision: int
    state: Literal["Pending", "Starting", "Ready", "Draining", "Stopping", "Backoff", "Failed"]
    incarnation: Annotated[int, "Counts its processes."]
    restarts: int
    pid: int | None
    since: Time
    message: str
    reason: str
    lastExit: Ended | None
    devices: list[str]
    logLost: Annotated[int, "Bytes of its log that could not be written, for example to a full disk."]
    model: NotRequired[Annotated[str, "In a list of all models' replicas."]]


class Revision(TypedDict):
    """One revision of a model."""

    revision: int
    templateHash: str
    state: Literal["Current", "Pinned", "Stable", "Canary", "RolledBack", "Leaving", "Old", "NeverRolledOut"]
    cause: str
    createdAt: Time
    stableAt: Annotated[Time | None, "When it was first rolled out as a whole."]
    failure: str | None
    loadSeconds: float | None
    model: NotRequired[Annotated[str, "In a list of all models' revisions."]]


class InForce(TypedDict):
    """What serves, where that is not what the manifest says."""

    revision: int
    resolved: dict[str, Any]


class Manager(TypedDict):
    """Where an object comes from."""

    source: Key
    commit: Annotated[str, "The one that last changed it."]
    file: str


class Event(TypedDict):
    """Something that was decided or seen; each line of `events -w -o json`."""

    apiVersion: NotRequired[str]
    id: int
    type: Literal["Normal", "Warning"]
    reason: str
    object: Key
    message: str
    count: int
    firstSeen: Time
    lastSeen: Time


class Object(TypedDict):
    """`get KIND/NAME`, `describe KIND/NAME`; each line of `get -w -o json`."""

    apiVersion: NotRequired[str]
    kind: Literal["model", "route", "gateway", "accesspolicy", "gitsource"]
    name: str
    generation: Annotated[int, "Grows with each apply that changes it; 0 for the gateway without a manifest."]
    intent: Annotated[dict[str, Any], "As submitted."]
    resolved: Annotated[dict[str, Any], "The spec with all defaults, frozen at the apply."]
    createdAt: Time | None
    deleting: bool
    status: Status
    replicas: list[Replica]
    revisions: Annotated[list[Revision], "Newest first."]
    inForce: NotRequired[InForce | None]
    managedBy: NotRequired[Annotated[Manager | None, "The GitSource that it is of."]]
    events: NotRequired[Annotated[list[Event], "Of `describe`."]]


class Deleted(TypedDict):
    """A line of `get -w -o json`: this object is no more."""

    apiVersion: str
    kind: Literal["Deleted"]
    deleted: Key


class ObjectList(TypedDict):
    """`get models`, `get routes`, `get gateway`, `get accesspolicies`, `get gitsources`."""

    apiVersion: str
    kind: Literal["ObjectList"]
    items: list[Object]


class ReplicaList(TypedDict):
    """`get replicas`."""

    apiVersion: str
    kind: Literal["ReplicaList"]
    items: list[Replica]


class RevisionList(TypedDict):
    """`get revisions`, `rollout history`."""

    apiVersion: str
    kind: Literal["RevisionList"]
    items: list[Revision]


class SyncList(TypedDict):
    """`source history`."""

    apiVersion: str
    kind: Literal["SyncList"]
    items: list[Sync]


class EventList(TypedDict):
    """`events`, oldest first. With `-w` each line is one event."""

    apiVersion: str
    kind: Literal["EventList"]
    items: list[Event]


class RolloutStatus(TypedDict):
    """`rollout status`."""

    apiVersion: str
    kind: Literal["RolloutStatus"]
    key: Key
    generation: int
    summary: str
    servedRevision: int | None
    stableRevision: int | None
    rollout: Going | None
    replicas: Counts | None
    overrides: list[Decision] | None
    conditions: list[Condition] | None


class Change(TypedDict):
    """One field that differs."""

    path: str
    old: Annotated[Any, "null for what is new."]
    new: Annotated[Any, "null for what is gone."]
    update: Annotated[Literal["hot", "scale", "rolling", "immutable"], "What has to happen for it to take effect."]
    note: Annotated[str, "Why `update` is not the field's usual one."]


class Fit(TypedDict):
    """The arithmetic of one replica."""

    fits: bool
    weights: int
    activations: int
    overhead: int
    kv: int
    used: int
    limit: int
    numBlocks: int
    kvTokens: int
    maxModelLen: int
    reason: str | None
    counterOffers: list[str]
    lines: Annotated[list[str], "The same for people."]


class Budget(TypedDict):
    """What a rollout may do as things stand."""

    strategy: Literal["Auto", "RollingUpdate", "Recreate"]
    surge: int
    unavailable: int
    serving: Annotated[int, "Replicas that serve all the while."]
    stopFirst: bool


class Problem(TypedDict):
    """What is wrong with a manifest."""

    file: str
    line: int | None
    col: int | None
    path: str
    message: str
    hint: str | None
    reason: NotRequired[str]


class PlanItem(TypedDict):
    """What an apply would do with one object."""

    key: Key
    action: Literal["create", "update", "unchanged", "refused"]
    revision: Annotated[list[int | None], "Before and after."]
    changes: list[Change]
    fit: Fit | None
    resolved: Annotated[dict[str, Any] | None, "What `auto` would become."]
    rollout: str
    budget: Budget | None
    replaces: Annotated[int, "Running replicas that others take the place of."]
    ends: Annotated[list[str], "Kinds of decisions that it ends."]
    findings: Annotated[list[str], "What of the checkpoint may surprise."]
    notes: list[str]
    warnings: list[str]
    problem: NotRequired[Problem]


class Share(TypedDict):
    """What one model takes of a device. Bytes are those of one replica."""

    key: Key
    replicas: int
    memory: int
    weights: int
    kv: int
    surge: Annotated[int, "Replicas beside these while it rolls out."]


class Device(TypedDict):
    """One device with all models on it."""

    device: str
    total: int
    foreign: Annotated[int, "What other processes hold."]
    limit: Annotated[int, "What replicas may take."]
    free: int
    models: list[Share]


class Waiting(TypedDict):
    """Replicas that there is no room for."""

    key: Key
    replicas: int
    reason: str


class Guest(TypedDict):
    """A model on demand, which takes what others leave."""

    key: Key
    replicas: int
    memory: int


class Room(TypedDict):
    """The proof of fit of all models together."""

    devices: list[Device]
    waiting: list[Waiting]
    onDemand: list[Guest]


class Summary(TypedDict):
    """Objects by action."""

    create: int
    update: int
    delete: int
    refused: int


class Plan(TypedDict):
    """`plan`."""

    apiVersion: str
    kind: Literal["Plan"]
    items: list[PlanItem]
    room: Room
    summary: Summary


class Difference(TypedDict):
    """In what one manifest differs from what was applied."""

    key: Key
    action: Literal["create", "update", "unchanged"]
    changes: list[Change]
    intent: Annotated[dict[str, Any] | None, "Of a new one: all that its manifest declares."]


class DifferenceList(TypedDict):
    """`diff`."""

    apiVersion: str
    kind: Literal["DifferenceList"]
    items: list[Difference]


class Load(TypedDict):
    """What a model does now."""

    model: str
    up: Annotated[float, "Replicas that answer."]
    outTokensPerSecond: float
    inTokensPerSecond: float
    in_flight: float
    running: float
    waiting: float
    kv: Annotated[float, "Share of the cache in use, the mean over replicas."]


class LoadList(TypedDict):
    """`top`. With `-w` one a line."""

    apiVersion: str
    kind: Literal["LoadList"]
    items: list[Load]


class Spread(TypedDict):
    """Values of one kind. A percentile between two values is on the line between them."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class BenchRow(TypedDict):
    """What became of one request; null for what there is not."""

    index: int
    due: Annotated[float, "When it was to be sent, from the start of the run."]
    sent: Annotated[float, "When it was sent."]
    ttft: Annotated[float | None, "From `due` to the first text."]
    tpot: Annotated[float | None, "From the first text to the last, divided by the tokens behind the first."]
    e2e: Annotated[float | None, "From `due` to the end of the answer, or to the error."]
    itl: Annotated[list[float], "Inter-token latencies; how they are measured: `docs/chat-and-bench.md`."]
    inputTokensAsked: Annotated[int | None, "What the prompt was to have; null for those of a data set."]
    inputTokens: Annotated[int | None, "Prompt tokens, as the server counts, as all that follows."]
    cachedTokens: Annotated[int | None, "Those that a prefix cache had; null from a server that does not say."]
    outputTokensAsked: int | None
    outputTokens: int | None
    finishReason: str | None
    error: Annotated[str | None, "The kind of error it ended with; null where it was answered."]


class BenchGoodput(TypedDict):
    """Requests that were answered within all bounds."""

    requestsPerSecond: float
    share: Annotated[float, "Of all requests of the run, those that failed included."]


class BenchError(TypedDict):
    """Errors of one kind."""

    kind: str
    count: int
    message: Annotated[str, "Of the first."]


class BenchRun(TypedDict):
    """One load, and what was measured under it. Tokens and latencies are those of answered requests."""

    load: Annotated[str, "`concurrency N`, `rate N`, or `trace`."]
    concurrency: Annotated[int | None, "Requests at a time; null in an open loop."]
    rate: Annotated[float | None, "Requests a second that were sent; null for all at once, and otherwise."]
    startedAt: Time
    seconds: Annotated[float, "From the start to the end of the last answer."]
    requests: Annotated[int, "Answered and failed."]
    answered: int
    failed: int
    unfinished: Annotated[int, "On the way when the run was interrupted; in no other figure."]
    inputTokens: int
    cachedTokens: int | None
    outputTokens: int
    inputTokensAsked: int | None
    outputTokensAsked: int | None
    requestsPerSecond: Annotated[float, "Answered ones."]
    outputTokensPerSecond: float
    totalTokensPerSecond: Annotated[float, "Of prompts and answers."]
    ttft: Spread | None
    itl: Annotated[Spread | None, "Of all tokens of all requests."]
    tpot: Spread | None
    e2e: Spread | None
    lateness: Annotated[Spread | None, "How long behind its time each request was sent."]
    clientCpu: Annotated[float, "Share of one processor that this command used."]
    goodput: Annotated[BenchGoodput | None, "null where no bounds were given."]
    errors: list[BenchError]
    rows: NotRequired[Annotated[list[BenchRow], "In what `--save` writes, by index."]]


class BenchVersions(TypedDict):
    """What measured."""

    quire: str
    python: str
    system: str
    cpus: int


class BenchParameters(TypedDict):
    """What the result depends on; null for what was not given."""

    requests: int | None
    duration: float | None
    inputTokens: str | None
    outputTokens: str | None
    trace: Annotated[str | None, "The file."]
    speed: Annotated[float, "How many times as fast the trace's arrivals were."]
    dataset: Annotated[str | None, "The file."]
    prefixTokens: int
    endpoint: Literal["chat", "completions"]
    stream: bool
    ignoreEos: bool
    timeout: Annotated[float | None, "Of one answer."]
    goodput: Annotated[dict[str, float], "Bounds, by latency."]
    warmup: int
    seed: int
    extraBody: dict[str, Any]


class Bench(TypedDict):
    """`bench`; with the rows of each run it is what `--save` writes and `--compare` reads."""

    apiVersion: str
    kind: Literal["Bench"]
    url: str
    model: str
    fingerprint: Annotated[str | None, "The server's `system_fingerprint`."]
    startedAt: Time
    parameters: BenchParameters
    versions: BenchVersions
    tokensBy: Annotated[
        Literal["usage", "mean"] | None,
        "How tokens of an event were known: by the usage in it, or as the answer's mean. null without streams.",
    ]
    interrupted: bool
    runs: list[BenchRun]


class BenchDifference(TypedDict):
    """A parameter that is not alike."""

    name: str
    a: Any
    b: Any


class BenchRatio(TypedDict):
    """One figure of two results."""

    name: str
    a: float
    b: float
    ratio: Annotated[float | None, "b / a; null where a is 0."]


class BenchPair(TypedDict):
    """The same load in two results."""

    load: str
    figures: list[BenchRatio]


class BenchComparison(TypedDict):
    """`bench --compare A B`."""

    apiVersion: str
    kind: Literal["BenchComparison"]
    differences: list[BenchDifference]
    runs: list[BenchPair]
    onlyA: Annotated[list[str], "Loads that B does not have."]
    onlyB: list[str]


class Snapshot(TypedDict):
    """A commit of a repository in the cache of the hub."""

    source: str
    commit: str
    refs: list[str]
    bytes: int
    incompleteBytes: int
    prunableBytes: Annotated[int, "What a prune would free."]
    downloadedByQuire: bool
    lastUsed: Time | None
    usedBy: list[Key]
    formerlyUsedBy: list[Key]


class Cache(TypedDict):
    """`cache list`."""

    apiVersion: str
    kind: Literal["Cache"]
    folder: str
    free: int
    items: list[Snapshot]


class Pruned(TypedDict):
    """What was removed of one snapshot, or would be."""

    source: str
    commit: str
    bytes: int


class CachePrune(TypedDict):
    """`cache prune`."""

    apiVersion: str
    kind: Literal["CachePrune"]
    folder: str
    dryRun: bool
    items: list[Pruned]


class Secret(TypedDict):
    """A secret's name; never its value."""

    name: str
    set: bool
    usedBy: list[Key]


class SecretList(TypedDict):
    """`secret list`."""

    apiVersion: str
    kind: Literal["SecretList"]
    items: list[Secret]


class NewKey(TypedDict):
    """`key create`: the only place where a key stands."""

    apiVersion: str
    kind: Literal["NewKey"]
    name: str
    key: str
    id: Annotated[str, "Its public part."]
    hash: Annotated[str, "What stands in the manifest."]


class Used(TypedDict):
    """What was used, by the columns that were asked for."""

    day: NotRequired[Annotated[str, "Of UTC."]]
    policy: NotRequired[Annotated[str, "Empty where there was none."]]
    key: NotRequired[str]
    model: NotRequired[Annotated[str, "By the name of its manifest."]]
    requests: int
    promptTokens: int
    cachedTokens: Annotated[int, "Those of prompts that were not computed again."]
    completionTokens: int
    cost: Annotated[str, "By the prices of its time: a decimal number, as text."]


class UsageList(TypedDict):
    """`usage`."""

    apiVersion: str
    kind: Literal["UsageList"]
    since: str
    items: list[Used]
    budgets: Annotated[list[BudgetStanding], "All budgets of AccessPolicies, as they stand now."]


class Validation(TypedDict):
    """`validate`."""

    apiVersion: str
    kind: Literal["Validation"]
    valid: bool
    problems: list[Problem]


ANSWERS: dict[str, type] = {
    "get": ObjectList, "get KIND/NAME": Object, "get replicas": ReplicaList, "get revisions": RevisionList,
    "describe": Object, "events": EventList, "rollout status": RolloutStatus, "rollout history": RevisionList,
    "plan": Plan, "diff": DifferenceList, "validate": Validation, "top": LoadList, "bench": Bench,
    "bench --compare A B": BenchComparison, "cache list": Cache, "cache prune": CachePrune,
    "secret list": SecretList, "key create": NewKey, "usage": UsageList, "source history": SyncList,
}  # fmt: skip
"""What each command prints. `doctor` has a page of its own, `docs/doctor.md`; `schema` prints a JSON Schema."""
