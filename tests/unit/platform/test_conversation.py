"""What a chat request makes of the answer's text: marks that are tokens of their own, read or left in it."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.platform import tokenizers_for_tests as made

from quire.router import conversation
from quire.router.fleet import ServedModel
from quire.text import AnswerText, Tokenizer
from quire.text.dialects import REASONING, TOOLS, Content, Dialects, Reasoning, joined
from quire_schemas import wire
from quire_schemas.openai.chat import ChatRequest

HARMONY = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
CALL = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """All marks of all dialects are special tokens of it."""
    backend = made.byte_level()
    marks = {mark for tools in TOOLS.values() for mark in tools.marks}
    marks |= {mark for thoughts in REASONING.values() for mark in thoughts.marks}
    backend.add_special_tokens(sorted(marks))
    return Tokenizer.load(made.write(tmp_path_factory.mktemp("marks"), backend, template=TEMPLATE))


def serving(tokenizer: Tokenizer, dialects: Dialects) -> ServedModel:
    """A model of this tokenizer that writes in these ways."""
    route = wire.ModelRoute(
        model="m",
        names=("m",),
        revision=1,
        template_hash="0",
        tokenizer_dir="",
        chat_template_file=None,
        max_model_len=512,
        kv_tokens=1024,
        max_queue_length=1,
        max_queue_wait=1.0,
        created=0,
        replicas=(),
        tool_dialect=dialects.tools or "none",
        reasoning_dialect=dialects.reasoning or "none",
    )
    return ServedModel(route, tokenizer)


def answered(tokenizer: Tokenizer, dialects: Dialects, text: str, **options: Any) -> list[Any]:
    """The parts of an answer whose tokens are those of `text`."""
    asked = {"model": "m", "messages": [{"role": "user", "content": "?"}], **options}
    markup = conversation.render(ChatRequest.model_validate(asked), serving(tokenizer, dialects)).markup
    assert markup is not None
    answer, reader = AnswerText(tokenizer, visible=markup.visible), markup.reader()
    pieces = [answer.push(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    parts = [part for piece in (*pieces, answer.finish()) for part in reader.push(piece)]
    return joined(parts + reader.finish())


@pytest.mark.parametrize(
    ("dialects", "text"),
    [
        (Dialects("harmony", "harmony"), HARMONY),
        (Dialects(None, "mistral"), "[THINK]Hm.[/THINK]Yes."),
        (Dialects(None, "cohere"), "<|START_THINKING|>Hm.<|END_THINKING|>Yes."),
        (Dialects("deepseek_v31", "think"), f"Hm.</think>{CALL}"),
        (Dialects("deepseek_v31", None), CALL),
    ],
)
def test_an_answer_that_is_left_as_it_is_has_its_marks(
    tokenizer: Tokenizer, dialects: Dialects, text: str
) -> None:
    assert answered(tokenizer, dialects, text, separate_reasoning=False) == [Content(text)]


def test_marks_that_are_read_are_not_shown(tokenizer: Tokenizer) -> None:
    assert answered(tokenizer, Dialects("harmony", "harmony"), HARMONY) == [Reasoning("Hm."), Content("Yes.")]
