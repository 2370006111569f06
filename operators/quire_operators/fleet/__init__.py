"""Fleets: what starts, watches and stops processes. Nothing outside this package does."""
