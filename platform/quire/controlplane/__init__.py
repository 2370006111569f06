"""The control plane: admin API on a Unix socket, and the wiring of store, fleet and reconcilers.

`python -m quire.controlplane --state-dir DIR [--ready-fd N]` runs it. It may die at any time: router and
engines go on, and the next one finds them again. Torch is never loaded here; engines and router are command
lines to it.
"""
