"""The endpoints of an OpenAI-compatible server that are asked here, and how its errors read.

Shapes are msgspec Structs with the fields of interest alone, so that an event of a stream costs about a
microsecond; what else a server sends is passed over, and what it leaves out is empty.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

import msgspec

from quire import endpoint
from quire.remote.errors import BrokenOff, Lost, Refused, TimedOut, Unreachable, Unreadable
from quire.remote.http import Http, Take
from quire.remote.sse import Events

DONE = b"[DONE]"
MAX_SHOWN = 500
"""Characters that are shown of an error that is not in the API's own form."""


class Delta(msgspec.Struct):
    """What a chunk adds to a chat's answer; `thought` by whichever of its two names it came."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None

    @property
    def thought(self) -> str:
        return self.reasoning or self.reasoning_content or ""

    @property
    def text(self) -> str:
        return self.content or self.refusal or ""


class Choice(msgspec.Struct):
    """One choice, of a chunk or a whole answer, of chat or completions."""

    index: int = 0
    delta: Delta | None = None
    message: Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class PromptDetails(msgspec.Struct):
    """Where prompt tokens came from."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """Tokens as the server counts them."""

    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None


class Chunk(msgspec.Struct):
    """An event of a stream, or a whole answer."""

    choices: list[Choice] = []
    usage: Usage | None = None
    system_fingerprint: str | None = None
    error: Any = None


class Card(msgspec.Struct):
    """A model in the server's list; `root` is what several names may stand for."""

    id: str
    root: str | None = None
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[Card]


_chunks = msgspec.json.Decoder(Chunk)
_cards = msgspec.json.Decoder(_Cards)
_any = msgspec.json.Decoder()


class Server:
    """One server, by its base URL, which usually ends in `/v1`.

    `certificate` is the file of the one that the local router shows: it counts whatever name it is for. `timeout`
    is seconds for a whole answer, None for no limit. Every method raises `RemoteError`.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        certificate: str | None = None,
        timeout: float | None = None,
    ) -> None:
        self.url = base_url.rstrip("/")
        self._path = urlsplit(self.url).path
        self._timeout = timeout
        headers = {"user-agent": f"quire/{version('quire')}"}
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        try:
            trusted = endpoint.trust(self.url, certificate)
        except OSError as error:
            raise Unreachable(f"cannot read the certificate {certificate}: {error}") from error
        self._http = Http(self.url, headers, trusted)

    async def models(self) -> list[Card]:
        """What the server says it serves."""
        body = await self._whole("GET", "/models", b"")
        try:
            return _cards.decode(body).data
        except msgspec.MsgspecError as error:
            raise Unreadable(
                f"{self.url}/models is not a list of models: {error}",
                "a base URL usually ends in /v1",
                "unreadable answer",
            ) from error

    async def whole(self, path: str, body: bytes) -> Chunk:
        """The answer to a request without `stream`."""
        return chunk(await self._whole("POST", path, body))

    async def post(self, path: str, body: bytes, take: Take) -> None:
        """Send a request; `take` gets its answer as it comes, within the event loop's call."""
        await self._ask("POST", path, body, take)

    async def stream(self, path: str, body: bytes) -> AsyncGenerator[Chunk, None]:
        """The chunks of a stream, which ended with `[DONE]`. Leaving it early closes its connection."""
        events, waiting = Events(), asyncio.Queue[bytes | None]()

        def take(piece: bytes) -> None:
            for data in events.feed(piece):
                waiting.put_nowait(data)

        asking = asyncio.create_task(self.post(path, body, take))
        asking.add_done_callback(lambda _: waiting.put_nowait(None))
        done = False
        try:
            while (data := await waiting.get()) is not None:
                if data == DONE:
                    done = True
                elif not done:
                    yield chunk(data)
            await asking
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        if not done:
            raise cut_off()

    def close(self) -> None:
        self._http.close()

    async def _whole(self, method: str, path: str, body: bytes) -> bytes:
        parts: list[bytes] = []
        await self._ask(method, path, body, parts.append)
        return b"".join(parts)

    async def _ask(self, method: str, path: str, body: bytes, take: Take) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                answer = await self._http.ask(method, self._path + path, body, take)
        except TimeoutError as error:
            raise TimedOut(f"no whole answer within {self._timeout:g} s", kind="timeout") from error
        if answer.status != 200:
            raise _refusal(answer.status, answer.body, self.url)


def chunk(data: bytes) -> Chunk:
    """One event's data, or the body of a whole answer. Raises `BrokenOff` for an error, `Unreadable` for what is
    no chunk."""
    try:
        found = _chunks.decode(data)
    except msgspec.MsgspecError as error:
        raise Unreadable(f"the server sent what is no answer: {error}", kind="unreadable answer") from error
    if found.error is not None:
        message, hint, code = _told({"error": found.error})
        raise BrokenOff(message or "the server gave no reason", hint, f"stream error {code}".rstrip())
    return found


def cut_off() -> Lost:
    """The error of a stream that ended without `[DONE]`."""
    return Lost("the stream ended without [DONE]", kind="cut off")


def _refusal(status: int, body: bytes, url: str) -> Refused:
    try:
        told = _any.decode(body)
    except msgspec.MsgspecError:
        told = None
    message, hint, code = _told(told)
    if message is None:
        text = body.decode(errors="replace").strip()
        message = f"the server answered {status}" + (f": {text[:MAX_SHOWN]}" if text else "")
    if hint is None and status in (401, 403):
        hint = "--api-key gives a key, and so does the variable OPENAI_API_KEY with --url"
    elif hint is None and status == 404 and not code:
        hint = f"a base URL usually ends in /v1; this one is {url}"
    return Refused(status, message, hint, f"{status} {code}".rstrip())


def _told(body: Any) -> tuple[str | None, str | None, str]:
    """Message, hint and code out of the forms in which servers put them; the message is None where there is
    none."""
    error = body.get("error", body) if isinstance(body, dict) else None
    if isinstance(error, str):
        return error, None, ""
    if not isinstance(error, dict):
        return None, None, ""
    message = error.get("message") or error.get("detail")
    hint = error.get("hint")
    code = error.get("code") or error.get("type") or ""
    return (
        None if message is None else str(message)[: 4 * MAX_SHOWN],
        hint if isinstance(hint, str) else None,
        str(code)[:60],
    )


def encode(body: Mapping[str, Any]) -> bytes:
    """A request's body."""
    return msgspec.json.encode(body)
