"""The engine: token ids in, token ids out, over a paged KV cache. It knows nothing of text."""
