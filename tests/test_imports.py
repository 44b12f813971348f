"""Import directions: a login node needs no torch, pure rooms stay testable without a cluster, and the loop has one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for name in ("cyclebnn_dist", "launch") for path in (ROOT / name).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, inside_functions: bool = True) -> Iterator[str]:
    """Yield every module, and every name that may be a module, that a file imports; not what is for type checkers only."""
    package = path.relative_to(ROOT).parts[:-1]
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


def importers(*targets: str, within: tuple[str, ...] = ("",), inside_functions: bool = True) -> set[str]:
    """Return the modules, of those that start with ``within``, that import one of the targets or something below it."""
    found = set()
    for path in SOURCES:
        name = module_name(path)
        if any(_below(name, room) for room in within):
            names = imports(path, inside_functions=inside_functions)
            if any(_below(imported, target) for imported in names for target in targets):
                found.add(name)
    return found


def _below(name: str, package: str) -> bool:
    return package in ("", name) or name.startswith(package + ".")


def test_this_file_sees_imports():
    assert "cyclebnn_dist.config.load" in importers("omegaconf")
    assert "launch.job" in importers("cyclebnn_dist.train")
    assert "launch.job" not in importers("cyclebnn_dist.train", inside_functions=False)


def test_only_the_loader_imports_omegaconf():
    assert importers("omegaconf") == {"cyclebnn_dist.config.load"}


def test_config_and_launch_import_no_torch_anywhere():
    heavy = ("torch", "timm", "nvidia", "numpy", "numba", "deepspeed", "wandb", "matplotlib")
    assert importers(*heavy, within=("cyclebnn_dist.config", "launch")) == set()


def test_config_stands_alone():
    allowed = importers("cyclebnn_dist.config", within=("cyclebnn_dist.config",))
    assert importers("cyclebnn_dist", "launch", within=("cyclebnn_dist.config",)) == allowed
    for path in (ROOT / "cyclebnn_dist" / "config").glob("*.py"):
        ours = [name for name in imports(path) if _below(name, "cyclebnn_dist") or _below(name, "launch")]
        assert all(name == "cyclebnn_dist" or _below(name, "cyclebnn_dist.config") for name in ours), path


def test_launch_imports_only_what_needs_no_torch_at_submit_time():
    rooms = ("config", "run_folder", "batching", "guards.exit_status", "guards.preempt", "meeting")
    allowed = tuple(f"cyclebnn_dist.{room}" for room in rooms)
    for path in (ROOT / "launch").glob("*.py"):
        for name in imports(path, inside_functions=False):
            assert not _below(name, "cyclebnn_dist") or any(_below(name, room) for room in allowed), (
                path,
                name,
            )


def test_binary_precision_and_codec_know_no_process_groups():
    rooms = ("cyclebnn_dist.binary", "cyclebnn_dist.precision", "cyclebnn_dist.comm.codec")
    assert importers("torch.distributed", within=rooms) == set()


def test_schedules_need_no_torch():
    assert importers("torch", within=("cyclebnn_dist.precision",)) == set()


def test_break_even_and_scaling_are_arithmetic():
    rooms = ("cyclebnn_dist.comm.breakeven", "cyclebnn_dist.comm.scaling")
    assert importers("torch", "numpy", within=rooms) == set()


def test_only_train_search_and_bench_import_the_loop():
    allowed = ("cyclebnn_dist.train", "cyclebnn_dist.search", "cyclebnn_dist.bench")
    strangers = {
        name for name in importers("cyclebnn_dist.loop") if not any(_below(name, room) for room in allowed)
    }
    assert strangers == set()


def test_only_the_command_and_the_job_import_train():
    assert importers("cyclebnn_dist.train") <= {"cyclebnn_dist.__main__", "launch.job"}


def test_timm_is_imported_in_one_place():
    assert importers("timm") <= {"cyclebnn_dist.timm_import"}


@pytest.mark.parametrize(
    "modules",
    [
        "cyclebnn_dist.config, cyclebnn_dist.run_folder, cyclebnn_dist.batching",
        "launch, launch.__main__, launch.submit, launch.watch, launch.preview, launch.manage, launch.snapshot",
    ],
)
def test_a_login_node_needs_no_torch(modules):
    code = f"import {modules}; import sys; print(*({{'torch', 'timm', 'nvidia', 'numba', 'wandb', 'matplotlib'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_deepspeed_is_imported_only_when_a_recipe_asks_for_it():
    """It takes seconds, and writes to the console while it does."""
    code = "import cyclebnn_dist.train; import sys; print(*({'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
