"""A wheel brings the native kernels of every level, if it is built where a C++ compiler is.

Such a wheel is for this platform alone. Without a compiler it has none and is for all: the kernels are then built
at their first use. An editable install and a source distribution never have any.
"""

from __future__ import annotations

import importlib
import platform
import sys
import sysconfig
import tempfile
import types
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Prebuilt(BuildHookInterface):  # type: ignore[type-arg]
    """Called by hatchling around the build of a wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable" or platform.machine() != "x86_64" or sys.platform != "linux":
            return
        build = _build_module(Path(self.root))
        self.folder = tempfile.TemporaryDirectory()
        brought = {}
        for level in build.LEVELS:
            self.app.display_info(f"native kernels for {level.name}")
            try:
                made = build.put(level, Path(self.folder.name))
            except build.BackendUnavailable as error:
                self.app.display_warning(f"none in this wheel, they are built at their first use: {error}")
                continue
            brought[str(made)] = f"quire_kernels/cpu/prebuilt/{made.name}"
        if not brought:
            return
        build_data["force_include"].update(brought)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


def _build_module(root: Path) -> Any:
    """`quire_kernels.cpu.build`, without its packages: they load torch, which is not where wheels are built."""
    for name in ("quire_kernels", "quire_kernels.cpu"):
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [str(root / "kernels" / name.replace(".", "/"))]
    return importlib.import_module("quire_kernels.cpu.build")
