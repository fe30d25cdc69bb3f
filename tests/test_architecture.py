"""The dependency rule and start-up: imports go one way and in no cycle, and no folder shadows another package."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import workbench

ROOT = Path(__file__).parents[1]
# Package → packages it may import; torch and the torch-free packages meet in capture, experiments and cli.
MAY_IMPORT = {
    "errors": set(),
    "counting": set(),
    "_deferred_packages": set(),
    "_links": set(),
    "notebook": set(),
    "progress": {"counting", "notebook"},
    "compression": {"errors"},
    "memory": {"errors"},
    "file_lock": {"bounded_json", "errors", "signals"},
    "inputs": {"errors"},
    "outputs": {"bounded_json", "errors", "file_lock"},
    "row_output": {"errors", "file_lock", "outputs", "bounded_json"},
    "signals": {"errors"},
    "child_processes": set(),
    "registry": {"errors"},
    "version": set(),
    "bounded_json": {"errors", "inputs"},
    "kernels": set(),
    "hooks": {"bounded_json", "errors"},
    "harmony": {"counting", "inputs", "errors", "progress", "bounded_json", "outputs", "row_output", "signals"},
    "model": {"counting", "bounded_json", "kernels", "hooks", "harmony", "outputs", "errors"},
    "runs": {
        "counting",
        "compression",
        "harmony",
        "inputs",
        "errors",
        "progress",
        "file_lock",
        "memory",
        "outputs",
        "bounded_json",
    },
    "studies": {"counting", "progress", "outputs", "bounded_json", "version", "registry", "runs", "harmony", "errors"},
    "figures": {"counting", "notebook", "bounded_json", "outputs", "registry", "studies", "harmony", "errors"},
    "dashboards": {
        "counting",
        "child_processes",
        "bounded_json",
        "registry",
        "figures",
        "studies",
        "runs",
        "harmony",
        "errors",
    },
    "capture": {
        "counting",
        "child_processes",
        "inputs",
        "outputs",
        "row_output",
        "signals",
        "version",
        "kernels",
        "model",
        "hooks",
        "runs",
        "harmony",
        "errors",
        "notebook",
        "progress",
    },
    "data": {"counting", "outputs", "model", "kernels", "hooks", "harmony", "capture", "errors", "progress"},
    "bench": {
        "counting",
        "child_processes",
        "outputs",
        "kernels",
        "hooks",
        "model",
        "harmony",
        "capture",
        "experiments",
        "runs",
        "studies",
        "dashboards",
        "registry",
        "errors",
        "progress",
    },
    "experiments": {
        "counting",
        "bounded_json",
        "inputs",
        "outputs",
        "version",
        "registry",
        "row_output",
        "model",
        "kernels",
        "hooks",
        "capture",
        "runs",
        "studies",
        "harmony",
        "errors",
        "progress",
    },
    "research": {
        "version",
        "bounded_json",
        "inputs",
        "experiments",
        "model",
        "hooks",
        "capture",
        "runs",
        "studies",
        "harmony",
        "errors",
    },
    "live": {
        "counting",
        "outputs",
        "studies",
        "dashboards",
        "figures",
        "research",
        "capture",
        "model",
        "hooks",
        "kernels",
        "harmony",
        "errors",
    },
    "adapters": {
        "inputs",
        "bounded_json",
        "kernels",
        "model",
        "harmony",
        "outputs",
        "file_lock",
        "signals",
        "version",
        "errors",
        "progress",
    },
    "cli": {
        "counting",
        "bounded_json",
        "memory",
        "file_lock",
        "adapters",
        "live",
        "research",
        "outputs",
        "row_output",
        "registry",
        "bench",
        "experiments",
        "model",
        "capture",
        "runs",
        "studies",
        "figures",
        "dashboards",
        "harmony",
        "errors",
        "version",
    },
}
TORCH_FREE = ("runs", "studies", "figures", "dashboards", "harmony")


def modules() -> list[Path]:
    return (
        [p for p in (ROOT / "workbench").rglob("*.py", recurse_symlinks=True)]
        if sys.version_info >= (3, 13)
        else [
            p
            for package in (ROOT / "workbench").iterdir()
            for p in ([package] if package.suffix == ".py" else package.rglob("*.py"))
        ]
    )


def imports_of(path: Path) -> set[str]:
    """Dotted names of what a file imports, late imports and type-checking ones included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def package_of(path: Path) -> str:
    return path.relative_to(ROOT / "workbench").parts[0].removesuffix(".py")


def forbidden_imports(path: Path) -> list[str]:
    package = package_of(path)
    reached = {name.split(".")[1] for name in imports_of(path) if name.startswith("workbench.")}
    return sorted(reached - MAY_IMPORT[package] - {package, "__version__"})


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    if path.parent == ROOT / "workbench" and path.name == "__init__.py":
        return
    assert not forbidden_imports(path), f"{package_of(path)} may import {sorted(MAY_IMPORT[package_of(path)])}"


def test_a_forbidden_import_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAY_IMPORT, "capture", {"model"})
    assert "runs" in forbidden_imports(ROOT / "workbench/capture/job.py")


@pytest.mark.parametrize("package", TORCH_FREE)
def test_the_torch_free_packages_never_name_torch(package: str) -> None:
    for path in (ROOT / "workbench" / package).rglob("*.py"):
        torches = {n for n in imports_of(path) if n.split(".")[0] in ("torch", "transformer_lens", "transformers")}
        assert not torches, path


def test_the_dependency_rule_has_no_cycle() -> None:
    order: list[str] = []
    while len(order) < len(MAY_IMPORT):
        free = [
            package for package, needs in MAY_IMPORT.items() if package not in order and needs <= set(order) | {package}
        ]
        assert free, f"a cycle among {set(MAY_IMPORT) - set(order)}"
        order += free


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """What each module imports of the others: at the top, late, or for type checking only."""
    graph = {}
    for module, source in sources.items():
        imported: set[str] = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                imported |= {dotted if dotted in sources else node.module for dotted in names.values()}
        graph[module] = (imported & sources.keys()) - {module}
    return graph


def reached(graph: dict[str, set[str]], module: str) -> set[str]:
    """Modules that a module imports, directly or through others."""
    modules: set[str] = set()
    ahead = list(graph[module])
    while ahead:
        modules.add(ahead[-1])
        ahead += graph[ahead.pop()] - modules
    return modules


def cyclic(graph: dict[str, set[str]]) -> set[str]:
    """Modules that import themselves through others."""
    return {module for module in graph if module in reached(graph, module)}


def test_no_module_imports_itself_through_others() -> None:
    graph = import_graph({module_name(path): path.read_text() for path in modules()})
    assert cyclic(graph) == set()
    circular = {"a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import b", "b": "def f():\n    import a"}
    assert cyclic(import_graph(circular)) == {"a", "b"}  # a negative control


def test_linked_folders_shadow_no_package() -> None:
    for name in ("kernels", "hooks", "dashboards", "data"):
        assert not (ROOT / name / "__init__.py").exists()
        assert (ROOT / "workbench" / name).is_symlink()
        # a path entry for the checkout itself offers its folders as namespace packages, which yield to real ones
        away = f"sys.path = [entry for entry in sys.path if entry != {str(ROOT)!r}]"
        result = run(f"import importlib.util, sys; {away}; print(importlib.util.find_spec({name!r}))")
        assert str(ROOT) not in result, f"import {name} finds our folder"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout


def test_importing_the_package_costs_milliseconds() -> None:
    code = "import time; t = time.process_time(); import workbench; print(time.process_time() - t)"
    own = min(float(run(code)) for _ in range(3))
    assert own < _cpu_seconds("-c", "import typer"), own  # 0.02 s and 0.07 s on a quiet machine


@pytest.mark.parametrize("name", ["HookedTransformer", "from_pretrained", "patching", "test_prompt", "render"])
def test_names_of_other_libraries_get_one_line_that_states_what_to_use(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"^module 'workbench' has no attribute '{name}'; use [^\n]*$"):
        getattr(workbench, name)
    with pytest.raises(AttributeError, match="has no attribute 'colour'; it has"):  # a negative control
        workbench.colour  # noqa: B018


def test_the_package_lists_its_public_names_and_has_them() -> None:
    code = """if True:
        import inspect, sys, workbench as wb
        assert "torch" not in sys.modules
        print(*dir(wb))
        assert all(getattr(wb, name) is not None for name in dir(wb))
        assert callable(wb.hooks.interventions.forbid) and callable(wb.kernels.moe.moe)
        assert "interventions" in dir(wb.hooks) and not hasattr(wb.hooks, "interventoins")
        parameters = inspect.signature(wb.capture).parameters
        assert {"model", "record"} <= set(parameters), parameters
        assert issubclass(wb.InputError, ValueError) and wb.Run.__name__ == "Run"
    """
    names = (
        "InputError Recorder Run __version__ accuracy answers capture dashboards direction experiments figures "
        "finetune harmony hooks kernels load open_run probe studies top_experts"
    )
    assert run(code).split() == names.split()


def test_studies_leave_torch_unloaded() -> None:
    code = "import sys, workbench as wb; wb.studies; wb.runs; wb.figures; wb.harmony; print('torch' in sys.modules)"
    assert run(code).strip() == "False"


def test_help_costs_little_more_than_the_libraries_of_a_command_line() -> None:
    """0.24 s of CPU time, and 0.13 s for the libraries: compared with each other, as machines differ and are busy."""
    libraries = _cpu_seconds("-c", "import typer, rich.console, rich.markdown")
    assert _cpu_seconds("-m", "workbench.cli", "--help") < 4 * libraries
    assert _cpu_seconds("-c", "import torch", runs=1) > 4 * libraries, "the limit does not notice an import of torch"


def _cpu_seconds(*arguments: str, runs: int = 3) -> float:
    """The least CPU time of some runs of Python with these arguments."""
    times = []
    for _ in range(runs):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)
