"""Trains the built-in model: corpus, tokenizer, weights, figures, in one run.

    python training/tiny/train.py --out platform/quire/builtin/tiny --seed 0

A Llama of five million parameters is trained in bfloat16 autocast on the CPU. Each step adds the gradients of a
few micro-batches of about a thousand tokens: rows of running English, and rows packed with conversations, in which
attention stays inside each conversation, positions start at zero and only the assistant's tokens are learned.
Hidden matrices are updated by Muon, the tied embedding and the norms by AdamW, both along one cosine. Threads take
whole micro-batches and their gradients are added in order, so the number of threads does not change the result.

The checkpoint is written every `--save-every` steps and at the end; every figure goes to `--log` as JSON lines.
"""

# Legend: B rows of a micro-batch, T tokens of a row, N heads, G key-value heads, H head size, D model width.

from __future__ import annotations

import argparse
import ctypes
import hashlib
import itertools
import json
import math
import platform
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus
import evaluate
import jinja2.sandbox
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

HERE = Path(__file__).parent
CONTEXT = 2048
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,  # set from the tokenizer
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 768,
    "max_position_embeddings": CONTEXT,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "num_key_value_heads": 4,
    "pad_token_id": None,  # set from the tokenizer
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 2048,
}
# A token of running text counts less than one of an answer: answers must be exact, prose only plausible.
WEIGHTS = {"english": 0.4, "chat": 1.0, "tools": 1.0}
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISIBLE_MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# Words with their leading space, except that a capital starts a token of its own: a name then has the same tokens
# after a space and after a quote, and copying it into a tool call is copying tokens. Digits stand alone.
WORDS = (
    r"'(?:[sdmt]|ll|ve|re)| (?=\p{Lu})| ?\p{Ll}+|\p{Lu}+\p{Ll}*|[^\S\r\n]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{N}\p{M}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# --- Tokenizer and template -----------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE over `texts`; the last ids are the special tokens and the marks that stay visible."""
    added = (END_OF_TEXT, IM_START, IM_END, *VISIBLE_MARKS)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"] - len(added),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in added[:3]])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in added[3:]])
    if tokenizer.get_vocab_size() != CONFIG["vocab_size"]:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, not {CONFIG['vocab_size']}")
    return tokenizer


def token_id(tokenizer: Tokenizer, text: str) -> int:
    """The id of a token that must exist."""
    found: int | None = tokenizer.token_to_id(text)
    if found is None:
        raise KeyError(text)
    return found


def load_template() -> jinja2.Template:
    """The chat template, in an environment that behaves like the one of transformers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string((HERE / "chat_template.jinja").read_text(encoding="utf-8"))


def render(template: jinja2.Template, chat: corpus.Chat) -> list[tuple[str, bool]]:
    """A conversation as pieces of text, each with whether it is learned.

    Every assistant message is learned when the prompts nest; where the template rewrites history (it drops earlier
    `<think>` parts), only the last one is.
    """
    pieces: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        prompt = template.render(
            messages=chat.messages[:index],
            tools=chat.tools or None,
            add_generation_prompt=True,
            enable_thinking=chat.thinking,
        )
        if not prompt.startswith(done):
            pieces, done = [], ""
        pieces += [(prompt[len(done) :], False), (message["content"] + IM_END, True)]
        done = prompt + message["content"] + IM_END
    return pieces


# --- Rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rows:
    """One micro-batch. Targets of -1 are not learned."""

    tokens: Tensor  # [B, T]
    targets: Tensor  # [B, T]
    positions: Tensor  # [B, T]
    bias: Tensor  # [B, T, T] bf16, added to the attention scores


def _causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def english_rows(stream: Iterator[int], rows: int, length: int) -> Rows:
    """Rows of running text, whose documents follow each other with an end-of-text token between them."""
    ids = torch.tensor([list(itertools.islice(stream, length + 1)) for _ in range(rows)])
    bias = torch.zeros(length, length).masked_fill(~_causal(length), -math.inf).bfloat16()
    positions = torch.arange(length).expand(rows, length)
    return Rows(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions, bias.expand(rows, length, length))


def packed_rows(documents: Iterator[tuple[list[int], list[bool]]], rows: int, length: int) -> Rows:
    """Rows packed with whole documents; a document never sees its neighbours."""
    tokens = torch.zeros(rows, length, dtype=torch.long)
    targets = torch.full((rows, length), -1)
    positions = torch.zeros(rows, length, dtype=torch.long)
    owner = torch.full((rows, length), -1)
    waiting: tuple[list[int], list[bool]] | None = None
    for row in range(rows):
        start = count = 0
        while True:
            ids, learned = waiting or next(documents)
            waiting = None
            size = len(ids) - 1  # the last token is only a target
            if size > length:
                continue
            if start + size > length:
                waiting = ids, learned
                break
            span = slice(start, start + size)
            tokens[row, span] = torch.tensor(ids[:-1])
            targets[row, span] = torch.tensor(
                [i if keep else -1 for i, keep in zip(ids[1:], learned[1:], strict=True)]
            )
            positions[row, span] = torch.arange(size)
            owner[row, span] = count
            start, count = start + size, count + 1
    seen = (owner[:, :, None] == owner[:, None, :]) & _causal(length)
    bias = torch.zeros(rows, length, length).masked_fill(~seen, -math.inf).bfloat16()
    return Rows(tokens, targets, positions, bias)


class Mixture:
    """The endless, seeded supply of micro-batches of each kind."""

    def __init__(self, tokenizer: Tokenizer, documents: list[str], seed: int) -> None:
        self.tokenizer = tokenizer
        self.template = load_template()
        self.entries = corpus.read_entries()
        self.paragraphs = corpus.read_paragraphs()
        self.end = token_id(tokenizer, END_OF_TEXT)
        texts = documents + [text for _, text in self.paragraphs]
        self.documents = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        self.english = self._english(random.Random(seed))
        self.chats = self._chats(random.Random(seed + 1))
        self.calls = self._calls(random.Random(seed + 2))

    def _english(self, rng: random.Random) -> Iterator[int]:
        while True:
            order = list(range(len(self.documents)))
            rng.shuffle(order)
            for index in order:
                yield from self.documents[index]
                yield self.end

    def _encode(self, chat: corpus.Chat) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        learned: list[bool] = []
        for text, learn in render(self.template, chat):
            piece = self.tokenizer.encode(text).ids
            ids += piece
            learned += [learn] * len(piece)
        return ids, learned

    def _chats(self, rng: random.Random) -> Iterator[tuple[list[int], list[bool]]]:
        while True:
            kind = rng.choices(("question", "turns", "paragraph", "repeat", "sum"), (30, 4, 5, 16, 45))[0]
            if kind == "question":
                chat = corpus.question_chat(rng, self.entries)
            elif kind == "turns":
                chat = corpus.question_chat(rng, self.entries, turns=rng.randint(2, 3))
            elif kind == "paragraph":
                chat = corpus.paragraph_chat(rng, self.paragraphs)
            elif kind == "repeat":
                chat = corpus.repeat_chat(rng)
            else:
                chat = corpus.sum_chat(rng)
            yield self._encode(chat)

    def _calls(self, rng: random.Random) -> Iterator[tuple[list[int], list[bool]]]:
        while True:
            yield self._encode(corpus.tool_chat(rng, self.entries))

    def step(self, step: int, steps: int) -> list[tuple[str, Rows]]:
        """The micro-batches of one step: English, conversations, tools, and by turns one more of the last two.

        In the last eighth some of the fourth ones are English in long rows.
        """
        if step % 4 == 0:
            fourth = "tools", packed_rows(self.calls, 2, 512)
        elif step % 4 == 2 and step >= steps * 7 // 8:
            fourth = "english", english_rows(self.english, 1, 1024)
        else:
            fourth = "chat", packed_rows(self.chats, 4, 256)
        return [
            ("english", english_rows(self.english, *((2, 512) if step % 2 else (4, 256)))),
            ("chat", packed_rows(self.chats, 4, 256)),
            ("tools", packed_rows(self.calls, 2, 512)),
            fourth,
        ]


# --- Model ----------------------------------------------------------------------------------------


class Dropout:
    """Drops one element in ten, by a generator of its own; without a seed it drops nothing.

    Only English rows are trained with it: the prose is read several times, and is to be learned, not memorised.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __call__(self, x: Tensor) -> Tensor:
        if self.generator is None:
            return x
        return x * torch.empty_like(x).bernoulli_(0.9, generator=self.generator).div_(0.9)


class Layer(nn.Module):
    """One decoder layer; parameter names follow the Hugging Face checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        width, inner, head = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
        heads, groups = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
        self.input_layernorm = nn.RMSNorm(width, CONFIG["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(width, CONFIG["rms_norm_eps"])
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(width, heads * head, bias=False),
                "k_proj": nn.Linear(width, groups * head, bias=False),
                "v_proj": nn.Linear(width, groups * head, bias=False),
                "o_proj": nn.Linear(heads * head, width, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(width, inner, bias=False),
                "up_proj": nn.Linear(width, inner, bias=False),
                "down_proj": nn.Linear(inner, width, bias=False),
            }
        )

    def forward(
        self, x_BTD: Tensor, cos_BTH: Tensor, sin_BTH: Tensor, bias_MTT: Tensor, dropout: Dropout
    ) -> Tensor:
        batch, length, _ = x_BTD.shape
        head, heads, groups = CONFIG["head_dim"], CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]

        def split(x: Tensor, count: int) -> Tensor:
            return x.view(batch, length, count, head).transpose(1, 2)

        def rotate(x_BNTH: Tensor) -> Tensor:
            first, second = x_BNTH.chunk(2, -1)
            return x_BNTH * cos_BTH[:, None] + torch.cat((-second, first), -1) * sin_BTH[:, None]

        normed = self.input_layernorm(x_BTD)
        q = rotate(split(self.self_attn["q_proj"](normed), heads))
        k = rotate(split(self.self_attn["k_proj"](normed), groups)).repeat_interleave(heads // groups, 1)
        v = split(self.self_attn["v_proj"](normed), groups).repeat_interleave(heads // groups, 1)
        q_MTH, k_MTH, v_MTH = (x.reshape(batch * heads, length, head) for x in (q, k, v))  # M = B * N
        # written out: at these lengths it is faster on a CPU than the fused attention
        scores = torch.baddbmm(bias_MTT, q_MTH, k_MTH.transpose(1, 2), alpha=head**-0.5)
        with torch.autocast("cpu", enabled=False):
            mixed = torch.bmm(torch.softmax(scores, -1), v_MTH)
        mixed = mixed.view(batch, heads, length, head).transpose(1, 2).reshape(batch, length, heads * head)
        x_BTD = x_BTD + dropout(self.self_attn["o_proj"](mixed))
        normed = self.post_attention_layernorm(x_BTD)
        gated = F.silu(self.mlp["gate_proj"](normed)) * self.mlp["up_proj"](normed)
        out_BTD: Tensor = x_BTD + dropout(self.mlp["down_proj"](gated))
        return out_BTD


class Decoder(nn.Module):
    """The model with its loss. The head is the embedding."""

    cos: Tensor  # [positions, H]
    sin: Tensor  # [positions, H]

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(CONFIG["vocab_size"], CONFIG["hidden_size"])
        self.layers = nn.ModuleList(Layer() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = nn.RMSNorm(CONFIG["hidden_size"], CONFIG["rms_norm_eps"])
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = (2 * CONFIG["num_hidden_layers"]) ** -0.5 if deep else 1.0
                nn.init.normal_(parameter, std=CONFIG["initializer_range"] * scale)
        inverse = CONFIG["rope_theta"] ** (-torch.arange(0, CONFIG["head_dim"], 2).float() / CONFIG["head_dim"])
        angles = torch.arange(CONTEXT).float()[:, None] * torch.cat((inverse, inverse))
        self.register_buffer("cos", angles.cos().bfloat16(), persistent=False)
        self.register_buffer("sin", angles.sin().bfloat16(), persistent=False)

    def forward(self, rows: Rows, dropout: Dropout) -> tuple[Tensor, int]:
        """The summed loss in nats and the number of learned tokens."""
        batch, length = rows.tokens.shape
        cos, sin = self.cos[rows.positions], self.sin[rows.positions]
        bias = rows.bias[:, None].expand(batch, CONFIG["num_attention_heads"], length, length)
        bias = bias.reshape(-1, length, length)
        x = self.embed_tokens(rows.tokens)
        for layer in self.layers:
            x = layer(x, cos, sin, bias, dropout)
        learned = rows.targets.flatten() >= 0
        hidden = self.norm(x).flatten(0, 1)[learned]
        logits = F.linear(hidden, self.embed_tokens.weight).float()
        loss: Tensor = F.cross_entropy(logits, rows.targets.flatten()[learned], reduction="sum")
        return loss, int(learned.sum())


def export(model: Decoder, tokenizer: Tokenizer, out: Path) -> None:
    """Writes the checkpoint folder, readable by everyone."""
    out.mkdir(parents=True, exist_ok=True)
    state = {f"model.{name}": p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    end, im_end = token_id(tokenizer, END_OF_TEXT), token_id(tokenizer, IM_END)
    template = (HERE / "chat_template.jinja").read_text(encoding="utf-8")
    files: dict[str, dict[str, Any]] = {
        "config.json": {**CONFIG, "eos_token_id": im_end, "pad_token_id": end},
        "generation_config.json": {"do_sample": False, "eos_token_id": [im_end, end], "pad_token_id": end},
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_prefix_space": False,
            "additional_special_tokens": [IM_START],
            "bos_token": None,
            "chat_template": template,
            "clean_up_tokenization_spaces": False,
            "eos_token": IM_END,
            "model_max_length": CONTEXT,
            "pad_token": END_OF_TEXT,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tokenizer.save(str(out / "tokenizer.json"))


# --- Training -------------------------------------------------------------------------------------


def keep_memory() -> None:
    """Tells glibc to keep freed memory: mapping fresh pages for every activation costs a fifth of the time."""
    if sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never give memory back
        libc.mallopt(-2, 1 << 26)  # M_TOP_PAD: grow in large steps
        libc.mallopt(-8, 1)  # M_ARENA_MAX: the backward pass has a thread, and would have an arena, of its own


def rate(step: int, steps: int) -> float:
    """The share of the peak learning rate: a short linear rise, then a cosine to a fiftieth."""
    if step < 100:
        return (step + 1) / 100
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - 100) / max(1, steps - 100)))


def gradients(
    model: Decoder, rows: Rows, dropout: Dropout, weight: float
) -> tuple[float, int, tuple[Tensor, ...]]:
    """The summed loss of a micro-batch, its learned tokens, and `weight` times the loss's gradients."""
    with torch.autocast("cpu", torch.bfloat16):
        loss, count = model(rows, dropout)
    return loss.item(), count, torch.autograd.grad(loss * weight, list(model.parameters()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the built-in model.")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--log", type=Path, default=HERE / "log.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2, help="micro-batches computed at the same time")
    args = parser.parse_args()

    keep_memory()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    started = time.monotonic()
    log = args.log.open("w", encoding="utf-8")

    def record(**row: Any) -> None:
        log.write(json.dumps(row) + "\n")
        log.flush()
        print(json.dumps(row), flush=True)

    documents = corpus.english_documents()
    rng = random.Random(args.seed)
    template, entries = load_template(), corpus.read_entries()
    chats = [corpus.question_chat(rng, [entry]) for entry in entries for _ in range(4)]
    chats += [corpus.tool_chat(rng, entries) for _ in range(400)] + [corpus.sum_chat(rng) for _ in range(200)]
    rendered = ["".join(text for text, _ in render(template, chat)) for chat in chats]
    tokenizer = train_tokenizer(documents + [text for _, text in corpus.read_paragraphs()] + rendered)
    mixture = Mixture(tokenizer, documents, args.seed)
    model = Decoder()
    hidden = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    other = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    halves = hidden[: len(hidden) // 2], hidden[len(hidden) // 2 :]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(half, lr=2.5e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        for half in halves
    ]
    optimizers.append(torch.optim.AdamW(other, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0))
    peaks = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    record(
        event="start",
        seed=args.seed,
        steps=args.steps,
        threads=args.threads,
        parameters=sum(p.numel() for p in model.parameters()),
        english_characters=sum(map(len, documents)),
        english_tokens=sum(map(len, mixture.documents)),
        python=platform.python_version(),
        torch=torch.__version__,
        corpus={p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in corpus_files()},
    )

    pool = ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,))
    parameters = list(model.parameters())
    tokens = 0
    sums: dict[str, list[float]] = {}
    mark = time.monotonic(), 0
    for step in range(args.steps):
        share = rate(step, args.steps)
        for group, peak in peaks:
            group["lr"] = peak * share
        batches = mixture.step(step, args.steps)
        dropouts = [
            Dropout((args.seed * args.steps + step) * 8 + index if kind == "english" else None)
            for index, (kind, _) in enumerate(batches)
        ]
        work = [
            (model, rows, dropout, WEIGHTS[kind]) for (kind, rows), dropout in zip(batches, dropouts, strict=True)
        ]
        results = pool.map(lambda item: gradients(*item), work)
        learned = 0.0
        for (kind, rows), (loss, count, grads) in zip(batches, results, strict=True):
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
            entry = sums.setdefault(kind, [0.0, 0.0])
            entry[0] += loss
            entry[1] += count
            learned += count * WEIGHTS[kind]
            tokens += rows.tokens.numel()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(learned)
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        list(pool.map(lambda optimizer: optimizer.step(), optimizers))
        model.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0 or step + 1 == args.steps:
            now = time.monotonic()
            row: dict[str, Any] = {
                f"loss_{kind}": round(total / count, 4) for kind, (total, count) in sums.items()
            }
            if (step + 1) % 200 == 0:
                row["val_bpb"] = round(training_bpb(model, tokenizer), 4)
            record(
                step=step + 1,
                tokens=tokens,
                **row,
                grad_norm=round(float(norm), 3),
                lr_share=round(share, 4),
                tokens_per_s=round((tokens - mark[1]) / (now - mark[0])),
                elapsed_s=round(now - started),
            )
            sums, mark = {}, (time.monotonic(), tokens)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            export(model, tokenizer, args.out)
    pool.shutdown()
    torch.set_num_threads(args.threads)
    record(event="trained", elapsed_s=round(time.monotonic() - started))
    record(event="measured", **evaluate.measure(args.out))
    record(event="files", sha256=evaluate.digests(args.out))
    log.close()


def corpus_files() -> list[Path]:
    """The committed files that decide the corpus."""
    return [
        HERE / name for name in ("corpus.py", "qa.txt", "paragraphs.txt", "heldout.txt", "chat_template.jinja")
    ]


@torch.no_grad()
def training_bpb(model: Decoder, tokenizer: Tokenizer) -> float:
    """Bits per byte of the held-out text as seen in training precision, in rows of 512 tokens."""
    text = evaluate.HELD_OUT.read_text(encoding="utf-8")
    ids = tokenizer.encode(text).ids
    total = 0.0
    for start in range(0, len(ids) - 1, 512):
        window = ids[start : start + 513]
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = model(english_rows(iter(window), 1, len(window) - 1), Dropout())
        total += loss.item()
    return total / math.log(2) / len(text.encode())


if __name__ == "__main__":
    main()
