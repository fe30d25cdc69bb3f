"""The registry: records are found without importing their modules, and wrong ones are refused."""

import inspect
import re
import subprocess
import sys

import pytest

from workbench import registry
from workbench.capture.recording import parse
from workbench.errors import InputError
from workbench.model.config import PUBLISHED

SOURCE = 'STUDY = Study(name="demo", title="Demo", question="What?", requires=("routing or sinks",))\nimport nothing\n'


def test_reading_the_registry_imports_neither_torch_nor_a_study() -> None:
    code = (
        "import sys; from workbench import registry; names = [r.name for r in registry.records()];"
        "assert 'routing' in names and 'sink-ablation' in names;"
        "print([m for m in sys.modules if m in ('torch', 'numpy', 'xarray') or m.startswith('workbench.studies.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"


def test_every_record_names_modules_and_functions_that_exist() -> None:
    for record in registry.records():
        if isinstance(record, registry.Study):
            known = inspect.signature(record.load().study).parameters
            assert {"seed", *record.options} <= known.keys()
            assert callable(record.load_figures().gallery)


def test_a_record_is_read_from_source_that_cannot_be_imported() -> None:
    record = registry.record_in(SOURCE, "some.module")
    assert record == registry.Study(
        name="demo", title="Demo", question="What?", requires=("routing or sinks",), module="some.module"
    )
    assert registry.record_in("x = 1", "some.module") is None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ('name="demo"', 'name="../demo"'),
        ('"What?"', '"What."'),
        ('"What?"', "print(1)"),
        ("requires", "demands"),
    ],
)
def test_a_broken_record_is_refused(broken: str, message: str) -> None:
    with pytest.raises(InputError, match=r"demo|some\.module"):
        registry.record_in(SOURCE.replace(broken, message), "some.module")


def test_former_names_lead_to_the_same_record() -> None:
    former = {"cot": "chain-of-thought", "ablate": "expert-ablation", "silence": "sink-ablation"}
    assert {name: registry.find(name).name for name in former} == former
    with pytest.raises(InputError, match="study or experiment 'alchemy' does not exist; choose from routing"):
        registry.find("alchemy")


def test_a_run_without_the_required_quantity_is_refused() -> None:
    class Run:
        path = "run.zarr"
        recorded = ("logprobs",)

    record = registry.record_in(SOURCE, "some.module")
    assert record is not None
    with pytest.raises(InputError, match=r"recorded routing or sinks, and run\.zarr recorded logprobs: capture again"):
        record.check_recorded(Run())
    Run.recorded = ("sinks",)
    record.check_recorded(Run())


def test_what_a_refusal_suggests_can_be_recorded() -> None:
    class Run:
        recorded = ("tokens",)

    for record in (record for record in registry.records() if record.requires):
        with pytest.raises(InputError, match="capture again with") as refusal:
            record.check_recorded(Run())
        remedy = str(refusal.value).partition("capture again with ")[2]
        suggestions = re.findall(r"--(?:record|routing) ([\w:]+)", remedy)
        assert suggestions
        if suggestions not in (["host"], ["features:FOLDER"]):  # there is no autoencoder here
            parse(suggestions, PUBLISHED["20b"])
    with pytest.raises(InputError, match="cannot record 'activations'"):  # a negative control
        parse(["activations"], PUBLISHED["20b"])


def test_options_have_the_type_of_their_default() -> None:
    def study(run: object, *, scale: float = 0.5, n_boot: int = 10, seed: int = 0) -> None: ...

    record = registry.find("routing")
    checked = record.checked_options(study, {"scale": 2, "n_boot": 5})
    assert checked == {"scale": 2.0, "n_boot": 5}
    assert isinstance(checked["scale"], float)
    for wrong in ({"n_boot": "many"}, {"n_boots": 5}, {"run": None}):
        with pytest.raises(InputError, match=r"^routing(: option| has no option)"):
            record.checked_options(study, wrong)
