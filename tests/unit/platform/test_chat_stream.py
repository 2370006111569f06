"""The events of a chat stream: pieces of content, which have a short way, look as on the way of all others."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.effort import examples
from tests.unit.platform.test_conversation import serving

from quire import builtin
from quire.router.api.chat import ChatStream
from quire.router.job import Job, Shown, Update
from quire.router.spans import RequestSpan
from quire.text import Tokenizer
from quire.text.dialects import CallArguments, CallBegins, Content, Dialects, Part, Reasoning
from quire.text.markup import Markup
from quire_schemas import wire
from quire_schemas.openai.answer import Usage
from quire_schemas.openai.chat import ChatChunk, ChatRequest

USAGE = Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2)
TOLD = b',"usage":' + USAGE.model_dump_json().encode()
PARTS: st.SearchStrategy[Part] = st.one_of(
    st.builds(Content, st.text(max_size=4) | st.sampled_from(['""', '"', "\\", "\n\n"])),
    st.builds(Reasoning, st.text(min_size=1, max_size=2)),
    st.just(CallBegins(0, "f")),
    st.builds(CallArguments, st.just(0), st.text(min_size=1, max_size=2)),
)
UPDATES = st.builds(
    Update,
    st.integers(0, 2),
    st.just(""),
    st.just(()),
    st.none() | st.none() | st.sampled_from(["stop", "length"]),
    parts=st.lists(PARTS, min_size=1, max_size=1).map(tuple) | st.lists(PARTS, max_size=3).map(tuple),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(builtin.path())


def stream_of(tokenizer: Tokenizer, shown: Shown, **options: Any) -> ChatStream:
    job = Job(
        id="chatcmpl-1",
        asked_model='a "" model',
        model=serving(tokenizer, Dialects()),
        tokenizer=tokenizer,
        operation="chat",
        prompts=([1],),
        echoes=(),
        n=3,
        kept=3,
        sampling=wire.Sampling(max_tokens=1),
        shown=shown,
        stops=(),
        include_stop=False,
        skip_special_tokens=True,
        stream=True,
        arrived_at=0.0,
        span=RequestSpan.unseen(),
        markup=Markup(Dialects(), (), frozenset()),
        created=7,
    )
    asked = {"model": "m", "messages": [{"role": "user", "content": "?"}], "stream": True, **options}
    return ChatStream(job, ChatRequest.model_validate(asked))


@settings(max_examples=examples(30))
@given(st.lists(UPDATES, max_size=8), st.booleans())
def test_a_piece_of_content_looks_the_same_on_its_short_way(
    tokenizer: Tokenizer, updates: list[Update], usage: bool
) -> None:
    """Usage in every event takes the way of all others."""
    at_the_end = {"stream_options": {"include_usage": True}} if usage else {}
    always = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    short = stream_of(tokenizer, Shown(prompt_text=True), **at_the_end)
    long = stream_of(tokenizer, Shown(prompt_text=True), **always)
    for update in updates:
        made = short.events([update], lambda: USAGE)
        for event in made.split(b"\n\n")[:-1]:
            ChatChunk.model_validate_json(event.removeprefix(b"data: "), strict=True)
        whole = long.events([update], lambda: USAGE)
        other = whole.replace(TOLD, b',"usage":null' if usage else b"")
        assert _without_ids(made) == _without_ids(other)


def _without_ids(events: bytes) -> list[bytes]:
    """Calls have ids of their own."""
    return [event.split(b'"id":"call_')[0] for event in events.split(b"\n\n")]
