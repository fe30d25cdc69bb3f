"""TransformerLens is imported without transformers and datasets, and all its names are there as ever."""

import subprocess
import sys

import pytest
import transformer_lens

from workbench import _deferred_packages


def test_a_loaded_model_needs_no_transformers_and_every_name_is_the_one_of_the_executed_package() -> None:
    """The names are read before the packages are executed and afterwards, when transformers is there."""
    code = """if True:
        import importlib, inspect, sys
        import workbench as wb
        wb.load("nano")
        import transformer_lens as lens
        from workbench._deferred_packages import _NAMES
        packages = {name: importlib.import_module(name) for name in _NAMES}
        before = {(p, n): getattr(packages[p], n) for p, names in _NAMES.items() for n in names}
        assert all(inspect.isclass(value) for (p, _), value in before.items() if p == "transformer_lens"), before
        assert not hasattr(lens, "__wrapped__") and "head_detector" in inspect.getsource(lens)
        heavy = {"transformers", "datasets", "pandas", "pytest"}
        assert not heavy & sys.modules.keys()
        from transformer_lens import TransformerBridge
        assert inspect.isclass(TransformerBridge)
        assert heavy <= sys.modules.keys(), "a negative control: this is what the packages import"
        assert before == {(p, n): vars(packages[p])[n] for p, n in before}
        assert "head_detector" in dir(lens)
        try:
            from transformer_lens import HookedTransformer
        except ImportError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "removed in TransformerLens 4.0" in done.stdout


def test_packages_that_are_imported_already_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [])
    assert sys.modules["transformer_lens"] is transformer_lens
    _deferred_packages.defer()
    assert sys.meta_path == []
    monkeypatch.delitem(sys.modules, "transformer_lens")
    _deferred_packages.defer()
    _deferred_packages.defer()
    assert len(sys.meta_path) == 1, "a negative control, and only one finder"
