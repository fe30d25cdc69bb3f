"""The tests mirror the tree: `workbench/model/cache.py` is tested by `tests/model/test_cache.py`."""

import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
# tests of several modules together, or of what is not a module of the workbench
ACROSS_MODULES = {
    "capture/test_damage.py",
    "capture/test_exact_records.py",
    "capture/test_excluding.py",
    "capture/test_faults.py",
    "capture/test_layer_experts.py",
    "capture/test_memory.py",
    "cli/test_cli.py",
    "cli/test_fuzz.py",
    "cli/test_fuzz_checkpoints.py",
    "cli/test_fuzz_commands.py",
    "cli/test_fuzz_formats.py",
    "cli/test_every_command.py",
    "cli/test_fuzz_runs.py",
    "cli/test_outputs.py",
    "data/test_interop.py",
    "data/test_nano.py",
    "harmony/test_round_trip.py",
    "kernels/gpu/test_launches.py",
    "kernels/gpu/test_model.py",
    "model/formats/test_gguf.py",
    "model/test_checkpointing.py",
    "model/test_gradients.py",
    "model/test_hooks.py",
    "model/test_layer_experts.py",
    "model/test_parity.py",
    "model/test_paths.py",
    "model/test_synchronisation.py",
    "model/test_transformer_lens.py",
    "model/test_transformer_lens_habits.py",
    "notebooks/test_notebooks.py",
    "research/test_research.py",
    "runs/test_damage.py",
    "scripts/test_install_torch.py",
    "test_architecture.py",
    "test_docs.py",
    "test_docstrings.py",
    "test_howto.py",
    "test_howto_tasks.py",
    "test_language.py",
    "test_layout.py",
    "test_links.py",
    "test_packaging.py",
    "test_readme.py",
}


def strays(tests: Iterable[str], modules: set[str]) -> list[str]:
    """Tests that neither have the path of a module or package nor are listed above."""
    found = []
    for test in sorted(set(tests) - ACROSS_MODULES):
        folder, _, name = test.rpartition("/")
        subject = f"{folder}/{name}".strip("/").replace("test_", "", 1).removesuffix(".py")
        subject = subject.removesuffix("init").rstrip("/") if name == "test_init.py" else subject
        if subject not in modules:
            found.append(test)
    return found


def test_every_test_has_the_path_of_what_it_tests() -> None:
    workbench = ROOT / "workbench"
    paths = [p for part in workbench.iterdir() for p in ([part] if part.suffix == ".py" else part.rglob("*.py"))]
    modules = {str(p.relative_to(workbench).with_suffix("")) for p in paths}
    modules |= {str(p.parent.relative_to(workbench)) for p in paths}
    tests = [str(p.relative_to(ROOT / "tests")) for p in (ROOT / "tests").rglob("test_*.py")]
    assert strays(tests, modules) == []


def test_a_stray_test_is_found() -> None:
    modules = {"model/cache", "model"}
    tests = ["model/test_cache.py", "model/test_init.py", "model/test_cash.py", "test_docs.py", "cache/test_model.py"]
    assert strays(tests, modules) == ["cache/test_model.py", "model/test_cash.py"]


def unformatted(text: str) -> int:
    """Return how many statements of a source the formatter is told to leave alone."""
    return len(re.findall(r"#\s*fmt:\s*(?:skip|off)", text))


def test_only_kernels_keep_their_own_format() -> None:
    folders = ("workbench", "hooks", "dashboards", "data", "tests", "notebooks", "scripts")
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*.py") if p != Path(__file__)]
    kernels = (ROOT / "workbench" / "kernels", ROOT / "kernels")
    assert [
        str(p) for p in paths if unformatted(p.read_text("utf-8")) and not any(map(p.is_relative_to, kernels))
    ] == []
    assert unformatted("x = 1  # fmt: skip\n# fmt: off\n") == 2
