"""What sampling parameters that are about text become, ids for an engine, and which parameters there are."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from tests.unit.platform import tokenizers_for_tests as made

from quire import SamplingParams, builtin
from quire.text import AdvisedSampling, AnswerText, ParamRefused, Tokenizer, params
from quire_schemas import wire
from quire_schemas.openai.chat import CHAT_REFUSED, ChatRequest
from quire_schemas.openai.completions import COMPLETION_REFUSED, CompletionRequest

# What `SamplingParams` of engines of this kind have, as published, and three that their HTTP APIs have besides.
KNOWN = [
    *["n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "watermarking", "top_p"],
    *["top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens", "logprobs"],
    *["prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start", "logprob_token_ids", "flat_logprobs"],
    *["detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"],
    *["output_kind", "stream_interval", "structured_outputs", "logit_bias", "allowed_token_ids", "extra_args"],
    *["bad_words", "skip_reading_prefix_cache", "thinking_token_budget", "repetition_detection"],
    *["routed_experts_prompt_start", "trace_decode_token_ids"],
    *["truncate_prompt_tokens", "truncation_side", "logprobs_mode"],
]


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer.load(builtin.path("tiny"))


def test_a_bad_word_is_banned_as_it_begins_a_text_and_behind_a_space(tiny: Tokenizer) -> None:
    word = tiny.encode("page", add_special_tokens=False)
    behind = tiny.encode(" page", add_special_tokens=False)
    assert word != behind
    assert params.bad_words(tiny, ["page"], 2048) == (tuple(word), tuple(behind))
    assert params.bad_words(tiny, ["page", " page", "page"], 2048) == (tuple(word), tuple(behind))
    assert params.bad_words(tiny, [" page"], 2048) == (tuple(behind),)
    assert params.bad_words(tiny, [], 2048) == ()
    line = tuple(tiny.encode("\n", add_special_tokens=False))
    assert params.bad_words(tiny, ["\n"], 2048) == (line,), "a line end is not a space"


def test_what_the_vocabulary_cannot_give_is_refused_by_name(tiny: Tokenizer) -> None:
    last = max(tiny.encode(" page", add_special_tokens=False))
    with pytest.raises(ParamRefused, match=f"'bad_words' has a token outside the vocabulary of {last}") as error:
        params.bad_words(tiny, [" page"], last)
    assert error.value.param == "bad_words"
    params.check_ids({"stop_token_ids": [0, 9], "logit_bias": {9: 1.0}}, 10)
    for ids in ([10], [-1]):
        with pytest.raises(
            ParamRefused, match="'logit_bias' has a token id outside the vocabulary of 10"
        ) as error:
            params.check_ids({"stop_token_ids": [9], "logit_bias": ids}, 10)
        assert error.value.param == "logit_bias"
    assert tiny.thinking == (2042, 2043)
    assert params.thinking(tiny, 3, 2044) == wire.Thinking(3, (2042,), (2043,))
    unmarked = Tokenizer(made.byte_fallback(), {}, None, AdvisedSampling())
    for tokenizer, vocabulary in ((tiny, 2043), (unmarked, 2048)):
        with pytest.raises(ParamRefused, match="no tokens of it open and close a thought") as error:
            params.thinking(tokenizer, 3, vocabulary)
        assert error.value.param == "thinking_token_budget"


def test_a_prompt_is_cut_where_it_is_asked_for() -> None:
    ids = list(range(10))
    assert params.truncated(ids, None, None, 5, 1) == ids
    assert params.truncated(ids, 10, None, 5, 1) == ids
    assert params.truncated(ids, 3, None, 5, 1) == params.truncated(ids, 3, "left", 5, 1) == [7, 8, 9]
    assert params.truncated(ids, 3, "right", 5, 1) == [0, 1, 2]
    assert params.truncated(ids, -1, None, 8, 3) == ids[-5:]
    assert params.truncated(ids, -1, "right", 8, None) == ids[:7]
    assert params.truncated(ids, -1, None, 8, 9) == ids[-1:], "what then does not fit is refused as such"


def test_the_text_of_an_answer_ends_as_it_was_asked_to(tiny: Tokenizer) -> None:
    ids = tiny.encode("One page. Two pages.", add_special_tokens=False)
    end = 2041  # an end-of-text token, which has no text unless special tokens are shown
    dot = tiny.encode("!", add_special_tokens=False)[0]

    def text(stop_token: int | None = None, **rules: object) -> tuple[str, str | None]:
        answer = AnswerText(tiny, **rules)  # type: ignore[arg-type]
        out = ""
        for token in ids:
            out += answer.push(token)
            if answer.hit is not None:
                return out, answer.hit
        return out + answer.finish(stop_token), answer.hit

    assert text() == ("One page. Two pages.", None)
    assert text(stops=["."]) == ("One page", ".")
    assert text(stops=["."], include_stop=True) == ("One page.", ".")
    assert text(stops=[".", "Two"], min_tokens=len(ids) - 1) == ("One page. Two pages", ".")
    assert text(stops=["pages.x"]) == ("One page. Two pages.", None), "what was held back comes out at the end"
    assert text(dot) == ("One page. Two pages.", None)
    assert text(dot, include_stop=True) == ("One page. Two pages.!", None)
    assert text(end, include_stop=True) == ("One page. Two pages.", None)
    assert text(end, include_stop=True, skip_special_tokens=False)[0].endswith("pages.<|im_end|>")
    assert text(dot, include_stop=True, stops=["pages.!"]) == ("One page. Two pages.!", "pages.!")


def test_every_known_parameter_is_honoured_or_refused_by_name_as_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "sampling.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \| (\w+) \|", page, re.MULTILINE)
    offline = {field.name for field in dataclasses.fields(SamplingParams)}
    assert sorted(row[0] for row in rows) == sorted(KNOWN)
    assert offline <= set(KNOWN)
    for name, *said in rows:
        for word, honoured, refused in zip(
            said,
            (set(CompletionRequest.model_fields), set(ChatRequest.model_fields), offline),
            (COMPLETION_REFUSED, CHAT_REFUSED, SamplingParams.refused),
            strict=True,
        ):
            assert (name in honoured, name in refused) == {"yes": (True, False), "refused": (False, True)}[word], (
                name
            )
