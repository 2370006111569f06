"""A checkpoint as a GGUF file in bfloat16: `python write_gguf.py FOLDER FILE`.

It runs where the `gguf` package is installed, which is not where Quire is, so nothing of Quire is imported.
Numbers go over as they are; norms and biases become float32, as llama.cpp wants them. The rows of queries and keys
of a Llama model change places: there llama.cpp rotates neighbours and not halves.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def renamed(name: str) -> str:
    """llama.cpp's name of a tensor."""
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, part = module.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def tensors(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file in bfloat16, as the 16 bits of their numbers."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, "r", offset=8 + size)
    found = {}
    for name, told in header.items():
        if told["dtype"] != "BF16":
            raise SystemExit(f"{name} is {told['dtype']}, not BF16")
        begin, end = told["data_offsets"]
        found[name] = data[begin:end].view(np.uint16).reshape(told["shape"])
    return found


def neighbours(rows: Any, heads: int) -> Any:
    """Row i of the first and of the second half of a head next to each other."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kind = config["model_type"]
    writer = gguf.GGUFWriter(out, kind)
    writer.add_name(folder.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])

    tokens = [f"<{number}>" for number in range(config["vocab_size"])]
    kinds = [gguf.TokenType.UNUSED] * len(tokens)
    for text, number in tokenizer["model"]["vocab"].items():
        tokens[number], kinds[number] = text, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if kind == "qwen2" else "llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["e t"])  # it wants some; prompts come as ids
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])

    for name, numbers in tensors(folder / "model.safetensors").items():
        if kind == "llama" and "q_proj" in name:
            numbers = neighbours(numbers, heads)
        if kind == "llama" and "k_proj" in name:
            numbers = neighbours(numbers, kv_heads)
        if numbers.ndim == 1:
            writer.add_tensor(renamed(name), (numbers.astype(np.uint32) << 16).view(np.float32))
        else:
            raw = np.ascontiguousarray(numbers).view(np.uint8)
            writer.add_tensor(renamed(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
