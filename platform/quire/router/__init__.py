"""The router: OpenAI-compatible HTTP on one side, engines on Unix sockets on the other.

`python -m quire.router CONFIG.json` runs it; `config.py` tells what the file holds. Importing this package loads
nothing: the control plane reads `quire.router.config` without paying for a web framework.
"""
