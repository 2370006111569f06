"""The router's HTTP endpoints, one file per family; each brings its formats to `exchange`."""
