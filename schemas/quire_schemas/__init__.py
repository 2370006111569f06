"""Shapes: what the outside world writes or reads (Pydantic) and what crosses between processes (msgspec).

The ground floor of the house. Nothing here does I/O beyond reading the file it was asked to parse, and
nothing here may load torch.
"""
