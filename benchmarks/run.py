"""The one runner: `python -m benchmarks.run NAME`, where a name is one of those below.

    throughput   ours and transformers on the same weights, dtype and work
    cpu          ours against llama.cpp, oneDNN and transformers, and all of them against this machine
    kernels      a step with the native kernels and with the reference ones
    start-up     commands and imports in fresh processes
    tracing      routers that tell a collector nothing, traces, metrics too, and one that is dead
    scheduling   the host's part of a step
    host         everything in a step but the device, here and in another checkout
    router       what a router adds to requests, and how many it can take
    servers      what HTTP servers take around an application that does nothing
    balancer     the choice of replicas against others, in virtual time
    autoscaling  replicas that follow the load against fixed numbers of them, in virtual time
    control-plane  many models: a resync, one change, what get asks
    git          from a commit to its being served, by poll and by notification
    ahead        a full batch with and without asynchronous scheduling
    prefix       what the prefix cache saves and costs; blocks that n choices share
    structured   what a JSON Schema costs each step; hostile grammars beside streams
    quality      bits per byte of a text in each arithmetic
    drift        what a canary's exam says of changes whose size is known

A scenario is the module of that name: `arguments` and `run`. Rows go to `results/`, a table to stdout.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys

SCENARIOS = [line.split()[0] for line in (__doc__ or "").splitlines() if line.startswith("    ")]


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in SCENARIOS:
        print(__doc__, file=sys.stderr)
        sys.exit(0 if name in ("-h", "--help") else 2)
    scenario = importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.run {name}",
        description=scenario.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    scenario.arguments(parser)
    args = parser.parse_args(sys.argv[2:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # what was measured so far is written
    scenario.run(args)


if __name__ == "__main__":
    main()
