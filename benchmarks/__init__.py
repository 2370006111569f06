"""Benchmarks: a scenario is data, one runner, rows as JSON lines. See benchmarks/README.md."""
