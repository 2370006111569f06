"""What the workers of one router say to each other: to the *head*, the one that owns what all of them share, and
back.

Each worker has one end of a socket pair, which it inherits; nothing has a name, so nobody else can come to it, and
its end is the end of either process. A frame (`wire.frame`) is a `ToHead` or a `ToWorker`: all that came up in one
turn of the sender's loop, in its order.

What a worker asks has a `number` of its own, and gets exactly one answer with that number: a `Refused` with the
error that the head would have raised for a request of its own, or what the question is for. What is granted (an
entry, places, a seat) is known by the number that asked for it until the worker gives it back, or is gone.
Giving back what was not granted is no error: a question may be left before its answer is there.

Times named `*_at` and deadlines are `time.monotonic()` of the machine.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from quire_schemas.wire import RoutingTable

Replica = tuple[str, int]
"""Its id and its incarnation."""


class _Message(msgspec.Struct, tag=True, array_like=True):
    pass


# ── worker -> head: questions ─────────────────────────────────────────────────────────────────────────────────


class Enter(_Message):
    """Let a request of this tenant in, by his limits. Answer: `Done`."""

    number: int
    owner: str
    key: str


class Spent(msgspec.Struct, array_like=True):
    """What requests come to, as `budgets.Amount` has it."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost: int


class Reserve(_Message):
    """Take as much as the request of an entry may come to, of whose tokens it has used some. Answer: `Done`."""

    number: int
    entry: int
    used: int
    most: Spent


class TellLimits(_Message):
    """What an answer is to tell of a tenant's limits. Answer: `Limits`."""

    number: int
    owner: str
    key: str


class TakeTurn(_Message):
    """Whose turn it is at a route: for a request, where weights decide, and for a copy. Answer: `Turn`."""

    number: int
    route: str
    weighed: bool


class TryCanary(_Message):
    """Whether a request for a model is its canary's. Answer: `Told`."""

    number: int
    model: str


class Admit(_Message):
    """Hold places in a model's queue. Answer: `Done`."""

    number: int
    model: str
    sequences: int
    owner: str
    background: bool
    copy: bool = False
    """It copies a request, and is only for a seat that nobody else has."""


class Wanted(msgspec.Struct, array_like=True):
    """A sequence that is to be given to a replica."""

    request: str
    """Its request's id, for the log."""
    asked_model: str
    tokenizer: str
    """Fingerprint of what made its ids."""
    deadline: float
    prompt_tokens: int
    """Its prompt, and what was written to it already."""
    max_tokens: int
    attempts: int
    """That were made before."""
    priority: int = 0
    width: int = 1
    begun_with: str | None = None
    """The template hash of what has begun to answer, where something went out already."""
    avoid: tuple[str, ...] = ()
    prompt: int = 0
    """Which of its request's prompts it continues: all sequences of one go to one replica."""
    caller: str | None = None
    """Who stays with one replica."""
    chain: tuple[bytes, ...] = ()
    adapter: str = ""
    """Only replicas that have it come into question."""


class Find(_Message):
    """Find a replica for the sequence of a seat, which begins with the first of these. Answer: `Found`, and before
    it `News`; `FingerprintWanted` where there are suspects and none was told."""

    number: int
    seat: int
    model: str
    owner: str
    background: bool
    wanted: Wanted
    fingerprint: bytes = b""


class IsQueued(_Message):
    """Whether the sequence of a seat waits in its engine's queue. Answer: `Told`."""

    number: int
    seat: int


class HasOther(_Message):
    """Whether the sequence of a seat could be given to another replica than it has. Answer: `Told`."""

    number: int
    seat: int
    wanted: Wanted


class CheckBackground(_Message):
    """Whether one more response may be begun in the background. Answer: `Done`."""

    number: int


class GetPage(_Message):
    """What the router as a whole answers: `/metrics` or `/health`. Answer: `Page`."""

    number: int
    path: str


Question = (
    Enter | Reserve | TellLimits | TakeTurn | TryCanary | Admit | Find | IsQueued | HasOther | CheckBackground
    | GetPage
)  # fmt: skip


# ── worker -> head: what happened ─────────────────────────────────────────────────────────────────────────────


class Serving(_Message):
    """It takes requests from now on."""


class TableTaken(_Message):
    """It acts by this version."""

    version: int
    unusable: dict[str, str] = {}


class Links(_Message):
    """The replicas to which it is connected, all of them."""

    up: tuple[Replica, ...]


class Leave(_Message):
    """The request of an entry has ended, with so many tokens; `counted` no: another one stands for it."""

    entry: int
    used: int
    counted: bool = True


class GiveBack(_Message):
    """The places that were held with this number."""

    admission: int


class Begun(_Message):
    """The sequence of a seat has brought a token, or word that it could have."""

    seat: int


class Blame(_Message):
    """The engine of a seat died, or hung, before the sequence had brought one."""

    seat: int
    fingerprint: bytes


class Settle(_Message):
    """The attempt of a seat has ended, its claim has not; `well` as in `End`."""

    seat: int
    well: bool | None = None


class End(_Message):
    """A seat is not needed any more. `well`: whether the end of its sequence speaks for its replica or against it;
    None: it does not show."""

    seat: int
    well: bool | None = None


class Progress(_Message):
    """How many tokens sequences have, by their seats: of those that have gained some."""

    gained: list[tuple[int, int]]


class Used(_Message):
    """What a request came to, for the ledger."""

    policy: str
    key: str
    model: str
    spent: Spent


class Fared(msgspec.Struct, array_like=True):
    """How a request fared at one revision. `void`: its answer has no text, or was cut; times are seconds."""

    end: Literal["whole", "failed", "left"]
    void: bool = False
    first_token: float | None = None
    between_tokens: float | None = None


class Compare(_Message):
    """How a request fared that an entry of the table had, where it is compared with another one."""

    model: str
    fared: Fared


class Wake(_Message):
    """A batch was made or cancelled."""


class BeginResponse(_Message):
    """A response in the background is kept, and is to be worked on."""

    response: str
    size: int


class LeaveResponse(_Message):
    """A response in the background was cancelled."""

    response: str


class Counts(_Message):
    """All that it has counted since it began, once a second and when it is asked: its sign of life, too.

    By model the values of its series in their order, then those of routes by their labels.
    """

    models: dict[str, list[float]]
    routes: list[tuple[tuple[str, ...], float]] = []
    spans: dict[str, int] = {}
    requests: int = 0
    """That it has answered, of any kind."""
    refused: int = 0
    """Connections that it had no room for."""
    teller: int = 0
    """The number of the process that tells collectors for it; 0 where there is none."""
    ended: float = 0.0
    """Seconds of the processor that its children have had which have ended."""


class CountsFor(_Message):
    """The answer to `GetCounts`."""

    number: int
    counts: Counts


ToHead = (
    Question
    | Serving | TableTaken | Links | Leave | GiveBack | Begun | Blame | Settle | End | Progress | Used | Compare
    | Wake | BeginResponse | LeaveResponse | Counts | CountsFor
)  # fmt: skip


# ── head -> worker ────────────────────────────────────────────────────────────────────────────────────────────


class Take(_Message):
    """Act by this table. Answer: `TableTaken`."""

    table: RoutingTable


class GetCounts(_Message):
    """Answer: `CountsFor`."""

    number: int


class Finish(_Message):
    """Take no new request, let those in flight go on for at most `grace` seconds, then end them and exit."""

    grace: float


class News(_Message):
    """Of a seat that looks for a replica: it waits for one, or has got its part of the budget of retries."""

    seat: int
    what: Literal["held", "retrying"]


class Done(_Message):
    number: int


class Refused(_Message):
    """The error that the question ends with: the name of its class in `quire.errors`, and what it carries."""

    number: int
    kind: str
    message: str
    param: str | None = None
    retry_after: float | None = None


class FingerprintWanted(_Message):
    number: int


class Found(_Message):
    number: int
    replica: Replica
    lent: bool = False
    """Its engine's seat is lent (`wire.Generate.lent`)."""


class Told(_Message):
    number: int
    yes: bool


class Turn(_Message):
    """The model whose turn it is, if weights decide and there is one; `known` no: the head has no such route."""

    number: int
    known: bool
    model: str | None = None
    copied: bool = False


class Limits(_Message):
    """Headers."""

    number: int
    headers: list[tuple[bytes, bytes]]


class Page(_Message):
    number: int
    status: int
    body: bytes


Answer = Done | Refused | FingerprintWanted | Found | Told | Turn | Limits | Page
ToWorker = Take | GetCounts | Finish | News | Answer


class FromWorkerFrame(msgspec.Struct, array_like=True):
    """One frame to the head."""

    items: list[ToHead]


class FromHeadFrame(msgspec.Struct, array_like=True):
    """One frame to a worker."""

    items: list[ToWorker]
