"""The parts a decoder is put together from. Each holds its parameters and knows nothing of requests or files."""
