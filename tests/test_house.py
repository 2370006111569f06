"""The house rules that a machine can check: names, layers, who may load what, what the source may not contain."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from quire_schemas import signals

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "platform": "quire",
    "engine": "quire_engine",
    "kernels": "quire_kernels",
    "operators": "quire_operators",
    "schemas": "quire_schemas",
}
PYTHON_FILES = sorted(
    path for folder, package in FOLDERS.items() for path in (ROOT / folder / package).rglob("*.py")
)


def imports_of(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_each_top_folder_holds_exactly_its_one_package_and_is_no_package_itself() -> None:
    for folder, package in FOLDERS.items():
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/ must not be importable"
        packages = {p.parent.name for p in (ROOT / folder).glob("*/__init__.py")}
        assert packages == {package}
        assert (ROOT / folder / package / "py.typed").exists()


@pytest.mark.parametrize("statement", ["import platform; platform.machine()", "import transformers"])
def test_python_run_from_the_root_still_finds_the_standard_platform_module(statement: str) -> None:
    code = (
        f"{statement}; import platform; assert 'quire' not in (platform.__file__ or ''); platform.python_version()"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_control_plane_router_and_cli_start_without_torch() -> None:
    """One process for all of them, as none may bring it along."""
    code = (
        "import importlib, sys\n"
        "names = 'quire quire.text quire_operators.models quire.controlplane.app quire.router.app quire.cli'\n"
        "for name in names.split():\n"
        "    importlib.import_module(name)\n"
        "    bad = {'torch', 'transformers'} & set(sys.modules)\n"
        "    assert not bad, (name, bad)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


def test_a_router_starts_without_the_shapes_of_manifests() -> None:
    """It is started again after it was killed, while clients wait: what it never reads it does not load."""
    code = (
        "import sys, quire.router.__main__;"
        "bad = {'quire_schemas.model', 'quire_schemas.manifest', 'quire_schemas.access'} & set(sys.modules);"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


def test_a_control_plane_starts_without_what_only_some_stores_and_models_need() -> None:
    """Every command may start one, and waits for it."""
    code = (
        "import sys, quire.controlplane.__main__;"
        "bad = {'quire.text', 'jinja2', 'tokenizers', 'sqlalchemy.dialects.postgresql'} & set(sys.modules);"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


def test_engine_logic_runs_without_torch() -> None:
    code = (
        "import sys, quire_engine.scheduler, quire_engine.blocks, quire_engine.step;"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


def test_the_shim_uses_the_standard_library_alone() -> None:
    shim = ROOT / "operators/quire_operators/fleet/shim.py"
    assert imports_of(shim) <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_source_has_no_unsafe_loader_and_no_assert_as_check(path: Path) -> None:
    assert not imports_of(path) & {"pickle", "marshal", "shelve", "cloudpickle", "dill"}
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}: an assert vanishes under -O"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load"}, (
                f"{path}:{node.lineno}: {called}"
            )


def test_kernels_alone_have_arguments_without_types() -> None:
    for path in PYTHON_FILES:
        if "quire_kernels/triton" not in path.as_posix():
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            if not any(ast.unparse(mark).startswith("triton.jit") for mark in node.decorator_list):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                bare = [arg.arg for arg in given if arg.annotation is None and arg.arg not in ("self", "cls")]
                assert not bare, f"{path}:{node.lineno}: {node.name}: {bare}"
                assert node.returns is not None, f"{path}:{node.lineno}: {node.name}"


def test_every_module_says_what_it_does() -> None:
    silent = [
        str(p.relative_to(ROOT)) for p in PYTHON_FILES if ast.get_docstring(ast.parse(p.read_text())) is None
    ]
    assert not silent


def test_only_signals_spells_metric_names() -> None:
    names = {value for value in vars(signals).values() if isinstance(value, str) and value.startswith("quire_")}
    assert len(names) > 10
    for path in PYTHON_FILES:
        if path.name == "signals.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            spelled = node.value if isinstance(node, ast.Constant) else None
            assert spelled not in names, f"{path}:{getattr(node, 'lineno', 0)} spells {spelled}"


def test_outside_quire_opentelemetry_is_its_api_alone() -> None:
    for path in PYTHON_FILES:
        if path.is_relative_to(ROOT / "platform"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            assert not (module or "").startswith(("opentelemetry.sdk", "opentelemetry.exporter")), path


def test_litestar_is_above_its_published_holes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "litestar>=2.20" in project["project"]["dependencies"]
