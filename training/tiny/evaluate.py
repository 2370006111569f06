"""Measures a checkpoint of the built-in model with plain transformers, in float32 on the CPU.

    python training/tiny/evaluate.py --model platform/quire/builtin/tiny

Bits per byte: the held-out text in windows of 512 predicted tokens; each window begins with the last token of the
one before, and the very first token is not predicted. The nats are summed over all predicted tokens and divided by
ln 2 and by the bytes of the whole text.
Answers: greedy, at most 160 new tokens, and the decoded text must equal the expected text in every character; a
tool call is parsed, and its name and arguments must be equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import corpus
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
HELD_OUT = HERE / "heldout.txt"
WINDOW = 512


def bits_per_byte(model: Any, tokenizer: Any, text: str) -> float:
    """See the module's docstring."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    nats = 0.0
    for start in range(0, len(ids) - 1, WINDOW):
        window = torch.tensor([ids[start : start + WINDOW + 1]])
        with torch.no_grad():
            logits = model(window[:, :-1]).logits.float()
        nats += float(torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum"))
    return nats / math.log(2) / len(text.encode("utf-8"))


def answer(model: Any, tokenizer: Any, prompts: list[str], new_tokens: int = 160, batch: int = 64) -> list[str]:
    """Greedy continuations up to the end of the turn, visible marks kept, in the order of the prompts."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer(
            [prompts[i] for i in chosen],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=False,
        )
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        for i, row in zip(chosen, output[:, inputs["input_ids"].shape[1] :], strict=True):
            texts[i] = tokenizer.decode(row, skip_special_tokens=True)
    return texts


def prompt_of(tokenizer: Any, question: str, tools: list[dict[str, Any]] | None = None, **options: Any) -> str:
    """The prompt for one user message."""
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=False, **options
    )
    return str(text)


def parse_call(text: str) -> dict[str, Any] | None:
    """The one tool call of an answer, or None when there is not exactly one well-formed call."""
    begin, end = "<tool_call>\n", "\n</tool_call>"
    if not text.startswith(begin) or not text.endswith(end) or text.count(begin) != 1:
        return None
    try:
        call = json.loads(text[len(begin) : -len(end)])
    except json.JSONDecodeError:
        return None
    return call if isinstance(call, dict) else None


def share(right: list[bool]) -> float:
    return round(sum(right) / len(right), 4)


def measure(folder: Path, verbose: bool = False) -> dict[str, Any]:
    """All figures of a checkpoint, as recorded in the log."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    entries = corpus.read_entries()
    known = [(question, entry.answer) for entry in entries for question in entry.questions]
    answers = answer(model, tokenizer, [prompt_of(tokenizer, question) for question, _ in known])
    known_right = [got == want for got, (_, want) in zip(answers, known, strict=True)]

    offered = corpus.held_out_calls(seed=20, count=len(known))
    quiet = [(known[i], offered[i].tools) for i in range(0, len(known), 4)]
    silent = answer(model, tokenizer, [prompt_of(tokenizer, q, tools) for (q, _), tools in quiet])
    silent_right = [got == want for got, ((_, want), _) in zip(silent, quiet, strict=True)]

    cases = corpus.held_out_calls(seed=10, count=320)
    calls = answer(model, tokenizer, [prompt_of(tokenizer, case.question, case.tools) for case in cases])
    calls_right = [
        parse_call(got) == {"name": case.name, "arguments": case.arguments}
        for got, case in zip(calls, cases, strict=True)
    ]

    sums = corpus.held_out_sums(seed=10, count=400)
    workings = answer(model, tokenizer, [prompt_of(tokenizer, question) for question, _ in sums])
    sums_right = [got == want for got, (_, want) in zip(workings, sums, strict=True)]
    direct = answer(
        model, tokenizer, [prompt_of(tokenizer, question, enable_thinking=False) for question, _ in sums]
    )
    direct_right = [got == want.rpartition("\n")[2] for got, (_, want) in zip(direct, sums, strict=True)]

    if verbose:
        wrong = [(q, w, g) for (q, w), g, ok in zip(known, answers, known_right, strict=True) if not ok]
        wrong += [(c.question, c.name, g) for c, g, ok in zip(cases, calls, calls_right, strict=True) if not ok]
        wrong += [(q, w, g) for (q, w), g, ok in zip(sums, workings, sums_right, strict=True) if not ok]
        wrong += [(q, w, g) for ((q, w), _), g, ok in zip(quiet, silent, silent_right, strict=True) if not ok]
        for question, want, got in wrong:
            print(json.dumps({"question": question, "want": want, "got": got}))
    return {
        "heldout_bpb": round(bits_per_byte(model, tokenizer, HELD_OUT.read_text(encoding="utf-8")), 4),
        "qa_exact": share(known_right),
        "qa_questions": len(known),
        "qa_exact_with_unneeded_tools": share(silent_right),
        "tool_calls_exact_heldout_values": share(calls_right),
        "tool_calls_well_formed": share([parse_call(got) is not None for got in calls]),
        "tool_calls": len(cases),
        "sums_exact_heldout_pairs": share(sums_right),
        "sums_exact_without_thinking": share(direct_right),
        "sums": len(sums),
    }


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every shipped file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the built-in model.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--verbose", action="store_true", help="print every wrong answer")
    args = parser.parse_args()
    print(json.dumps(measure(args.model, args.verbose), indent=2))


if __name__ == "__main__":
    main()
