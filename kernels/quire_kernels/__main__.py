"""`python -m quire_kernels`: which back-ends can be used here, as one JSON object on stdout.

    python -m quire_kernels tilings                  the tilings that were chosen on this machine (`tilings`)
    python -m quire_kernels tilings --clear          forgets them: the next engine that starts measures anew
    python -m quire_kernels tilings --unmeasured     forgets those that there was no time to measure

    {"torch": version, "cuda": version torch was built for or null, "gpus": number that torch sees,
     "backends": [{"name", "available", "reason"}]}

A back-end is available when it loads and one small operation comes out right; otherwise `reason` says what
was in the way. For `platform doctor`, which runs it as a process of its own: nothing else there loads torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from quire_kernels import BACKENDS, KernelError, load, tilings


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m quire_kernels")
    commands = parser.add_subparsers(dest="command")
    asked = commands.add_parser("tilings").add_mutually_exclusive_group()
    asked.add_argument("--clear", action="store_true")
    asked.add_argument("--unmeasured", action="store_true")
    options = parser.parse_args()
    if options.command == "tilings":
        try:
            told = _tilings(clear=options.clear, unmeasured=options.unmeasured)
        except (OSError, KernelError) as error:
            sys.exit(f"error: {error}\nhint: XDG_CACHE_HOME says where they are")
        print(json.dumps(told, indent=1))  # noqa: T201
        return
    print(  # noqa: T201 - the report is what this program is for
        json.dumps(
            {
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "gpus": torch.cuda.device_count(),
                "backends": [check(name) for name in BACKENDS],
            }
        )
    )


def _tilings(*, clear: bool, unmeasured: bool) -> dict[str, Any]:
    if clear or unmeasured:
        return {"folder": str(tilings.folder()), "forgotten": tilings.clear(unmeasured=unmeasured)}
    return {"folder": str(tilings.folder()), "files": {path.name: content for path, content in tilings.kept()}}


def check(name: str) -> dict[str, Any]:
    """Whether a back-end loads and computes the norm of (3, 4)."""
    try:
        device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
        x = torch.tensor([[3.0, 4.0]], device=device)
        found = load(name).rms_norm(x, torch.ones(2, device=device), 0.0).cpu()
    except Exception as error:  # noqa: BLE001 - whatever stands in its way is what was asked for
        return {"name": name, "available": False, "reason": f"{type(error).__name__}: {error}"}
    wanted = torch.tensor([[3.0, 4.0]]) / 12.5**0.5
    right = bool(torch.allclose(found, wanted, atol=1e-3))
    return {"name": name, "available": right, "reason": None if right else f"it computed {found.tolist()}"}


if __name__ == "__main__":
    main()
