"""The router's HTTP endpoints, one file per family; `exchange.py` carries one request for text through."""
