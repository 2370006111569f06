"""The model that ships with the product: its files, its tokenizer and template, and what it was trained to do.

Everything here goes through plain transformers, so that a failure says something about the checkpoint alone.
Figures are compared with those that the training run recorded in `training/tiny/log.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.effort import examples
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from quire.builtin import names, path

TRAINING = Path(__file__).parents[3] / "training" / "tiny"
WINDOW = 512

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search the web.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    },
}

KNOWN_QUESTIONS = [
    "hi",
    "Who are you?",
    "What is Quire?",
    "What is PagedAttention?",
    "What is the KV cache?",
    "How large is a KV block?",
    "What does platform apply do?",
    "What is continuous batching?",
    "What is chunked prefill?",
    "What happens when the blocks run out?",
    "What is a manifest?",
    "What does the router do?",
    "How does a stream end?",
    "What is the capital of France?",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(path())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    """The rows of the training log that have a name, by name."""
    rows = [json.loads(line) for line in (TRAINING / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["event"]: row for row in rows if "event" in row}


def known_answers() -> dict[str, str]:
    answers: dict[str, str] = {}
    for block in (TRAINING / "qa.txt").read_text(encoding="utf-8").split("\n\n"):
        lines = block.splitlines()
        answer = next((line[3:] for line in lines if line.startswith("A: ")), "")
        answers |= {line[3:]: answer for line in lines if line.startswith("Q: ")}
    return answers


def reply(model: Any, tokenizer: Any, conversations: list[list[dict[str, Any]]], **template: Any) -> list[str]:
    """The greedy answer to each conversation, without special tokens."""
    prompts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template)
        for messages in conversations
    ]
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=96,
            do_sample=False,
        )
    return [tokenizer.decode(row[inputs["input_ids"].shape[1] :], skip_special_tokens=True) for row in output]


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


# --- the files ---------------------------------------------------------------------------------------------


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    assert names() == ("tiny",)
    with pytest.raises(LookupError, match=r"'huge'\nhint: .*tiny"):
        path("huge")
    with pytest.raises(LookupError, match="hint: "):
        path("../builtin/tiny")


def test_the_folder_is_a_small_bf16_llama_checkpoint() -> None:
    folder = path()
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12_000_000
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    with (folder / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__")
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert "lm_head.weight" not in header
    assert len(header) == 2 + 9 * config["num_hidden_layers"]


def test_the_shipped_files_are_those_of_the_recorded_run(recorded: dict[str, Any]) -> None:
    shipped = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path().iterdir()}
    assert shipped == recorded["files"]["sha256"]


# --- tokenizer and template --------------------------------------------------------------------------------


@cache
def backend() -> Tokenizer:
    return Tokenizer.from_file(str(path() / "tokenizer.json"))


@settings(max_examples=examples(200), deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = backend().encode(text).ids
    assert backend().decode(ids, skip_special_tokens=False) == text


def test_marks_stay_visible_and_special_tokens_do_not(tokenizer: Any) -> None:
    text = "<think>\n1\n</think>\n<tool_call>\n{}\n</tool_call>\n<tool_response>\n{}\n</tool_response>"
    ids = tokenizer(f"<|im_start|>{text}<|im_end|><|endoftext|>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    for mark in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</tool_response>"):
        assert len(tokenizer(mark, add_special_tokens=False)["input_ids"]) == 1
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.bos_token is None
    config = json.loads((path() / "generation_config.json").read_text(encoding="utf-8"))
    assert tokenizer.convert_ids_to_tokens(config["eos_token_id"]) == ["<|im_end|>", "<|endoftext|>"]


def test_every_digit_is_a_token_of_its_own(tokenizer: Any) -> None:
    assert tokenizer.tokenize("2048") == ["2", "0", "4", "8"]


def test_the_template_writes_chatml(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "What is 1 + 2?"}]},
        {"role": "assistant", "content": "<think>\n1 + 2 = 3\n</think>\n\n3"},
        {"role": "user", "content": "Thanks!"},
    ]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n3<|im_end|>\n<|im_start|>user\nThanks!<|im_end|>\n<|im_start|>assistant\n"
    )
    quiet = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    assert quiet == rendered + "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("arguments", ['{"city": "Köln"}', {"city": "Köln"}])
def test_the_template_writes_tools_calls_and_results(tokenizer: Any, arguments: object) -> None:
    messages = [
        *ask("What is the weather in Köln?"),
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}},
        ]},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"temperature": 9}'},
    ]  # fmt: skip
    rendered = tokenizer.apply_chat_template(messages, tools=[WEATHER, SEARCH], tokenize=False)
    system, _, rest = rendered.partition("<|im_end|>\n")
    assert "<tools>\n" + json.dumps(WEATHER) + "\n" + json.dumps(SEARCH) + "\n</tools>" in system
    assert rest == (
        "<|im_start|>user\nWhat is the weather in Köln?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call><|im_end|>\n'
        '<|im_start|>tool\n<tool_response>\n{"temperature": 9}\n</tool_response><|im_end|>\n'
    )


# --- what it knows -----------------------------------------------------------------------------------------


def test_bits_per_byte_of_the_held_out_text_are_as_recorded(
    model: Any, tokenizer: Any, recorded: dict[str, Any]
) -> None:
    text = (TRAINING / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    nats = 0.0
    for start in range(0, len(ids) - 1, WINDOW):
        window = torch.tensor([ids[start : start + WINDOW + 1]])
        with torch.no_grad():
            logits = model(window[:, :-1]).logits
        nats += float(torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum"))
    measured = nats / math.log(2) / len(text.encode("utf-8"))
    assert measured == pytest.approx(recorded["measured"]["heldout_bpb"], rel=0.01)


def test_the_held_out_text_was_not_trained_on() -> None:
    trained = (TRAINING / "paragraphs.txt").read_text(encoding="utf-8") + "".join(known_answers().values())
    sentences = [s.strip() for s in (TRAINING / "heldout.txt").read_text(encoding="utf-8").split(".")]
    assert [sentence for sentence in sentences if len(sentence) > 20 and sentence in trained] == []


def test_it_answers_by_heart(model: Any, tokenizer: Any) -> None:
    answers = known_answers()
    got = reply(model, tokenizer, [ask(question) for question in KNOWN_QUESTIONS])
    assert dict(zip(KNOWN_QUESTIONS, got, strict=True)) == {q: answers[q] for q in KNOWN_QUESTIONS}


def test_the_recorded_run_reached_its_marks(recorded: dict[str, Any]) -> None:
    measured = recorded["measured"]
    assert measured["qa_exact"] >= 0.95
    assert measured["tool_calls_well_formed"] >= 0.99
    assert measured["tool_calls_exact_heldout_values"] >= 0.9
    assert measured["sums_exact_heldout_pairs"] >= 0.9


def test_it_calls_a_tool_and_uses_the_result(model: Any, tokenizer: Any) -> None:
    question = ask("What is the weather in Paris?")
    (call,) = reply(model, tokenizer, [question], tools=[SEARCH, WEATHER])
    assert call == '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    result = {"role": "tool", "content": '{"temperature": 21, "sky": "sunny"}'}
    (final,) = reply(
        model, tokenizer, [[*question, {"role": "assistant", "content": call}, result]], tools=[SEARCH, WEATHER]
    )
    assert final == "In Paris it is 21 degrees and sunny."


def test_it_leaves_tools_alone_when_the_question_needs_none(model: Any, tokenizer: Any) -> None:
    (got,) = reply(model, tokenizer, [ask("What is PagedAttention?")], tools=[WEATHER])
    assert got == known_answers()["What is PagedAttention?"]


def test_it_works_out_a_sum_before_answering(model: Any, tokenizer: Any) -> None:
    questions = ["What is 7 + 5?", "What is 47 + 38?", "What is 52 - 17?", "What is 6 * 7?"]
    assert reply(model, tokenizer, [ask(question) for question in questions]) == [
        "<think>\n7 + 5 = 12\n</think>\n\n12",
        "<think>\n7 + 8 = 15\n40 + 30 = 70\n70 + 15 = 85\n</think>\n\n85",
        "<think>\n52 - 10 = 42\n42 - 7 = 35\n</think>\n\n35",
        "<think>\n6 * 7 = 42\n</think>\n\n42",
    ]
    (direct,) = reply(model, tokenizer, [ask("What is 7 + 5?")], enable_thinking=False)
    assert direct.isdecimal(), "told not to think, it answers at once (and not always rightly)"


def test_it_continues_in_plain_english(model: Any, tokenizer: Any) -> None:
    inputs = tokenizer("The function returns", return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=48,
            do_sample=False,
            repetition_penalty=1.3,
        )
    words = tokenizer.decode(output[0], skip_special_tokens=True).split()
    wordy = [word for word in words if word.strip(".,;:!?()'\"-").isalpha()]
    assert len(words) >= 15
    assert len(wordy) >= 0.85 * len(words)
