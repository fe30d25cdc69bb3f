"""The modules of the how-to pages for a study and an experiment, installed as packages, appear wherever they should."""

import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path

import pytest

import workbench as wb
from docs import commands_page
from tests.cli.test_cli import run
from tests.conftest import DATA
from workbench import registry
from workbench.errors import InputError
from workbench.figures import paper
from workbench.figures.report import write_report
from workbench.studies import run_study
from workbench.studies.result import load

DEMO = str(DATA / "demo.zarr")
HOWTO = Path(__file__).parents[1] / "docs" / "howto"
Install = Callable[[str], None]


def files(page: str) -> dict[str, str]:
    """The files that a page shows, by the names it gives them."""
    text = (HOWTO / page).read_text()
    return dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```', text, re.DOTALL | re.MULTILINE))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a page's module and the metadata that an installer would make of its pyproject.toml on the path."""

    def put(page: str, **changes: str) -> None:
        shown = files(page)
        project = tomllib.loads(shown.pop("pyproject.toml"))["project"]
        site = tmp_path / "site"
        info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir(parents=True)
        lines = [line for g, points in project["entry-points"].items() for line in (f"[{g}]", *_assignments(points))]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 1.0\n")
        for name, text in shown.items():
            (site / name).write_text(reduce(lambda part, change: part.replace(*change), changes.items(), text))
        monkeypatch.syspath_prepend(str(site))
        registry.records.cache_clear()

    yield put
    monkeypatch.undo()
    registry.records.cache_clear()
    for name in ("busiest_expert", "scaled_sinks"):
        sys.modules.pop(name, None)


def _assignments(points: dict[str, str]) -> list[str]:
    return [f"{name} = {value}" for name, value in points.items()]


def test_a_study_of_one_module_appears_in_every_list(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    question = "most used expert process more of the analysis"
    flat = " ".join(run(capsys, "study", "--help")[1].split())
    assert question not in flat
    install("study.md")
    flat = " ".join(run(capsys, "study", "--help")[1].split())
    assert "busiest-expert" in flat
    assert question in flat
    out = tmp_path / "out"
    code, text, err = run(
        capsys, "study", "busiest-expert", DEMO, "--out", str(out), "--option", "channel=final", "--seed", "3"
    )
    assert code == 0, err
    assert "layer 0:" in text
    saved = load(out)["busiest-expert"]["change"]
    assert json.loads(saved.attrs["parameters"]) == {"channel": "final"}
    assert saved.attrs["seed"] == 3
    opened = wb.open_run(DEMO)
    datasets = run_study("busiest-expert", opened)
    assert "busiest_expert" in dir(wb.figures)
    assert wb.figures.busiest_expert.gallery(datasets)["change_change"].draw().data
    assert wb.studies.busiest_expert.STUDY.name == "busiest-expert"
    assert "busiest-expert" in commands_page.studies_table()
    from workbench.dashboards.pages import made, page_titles
    from workbench.dashboards.session import Session
    from workbench.dashboards.state import RunRegistry, Selection

    assert page_titles()["busiest-expert"] == "Busiest expert and wrong answers"
    runs = RunRegistry([DEMO], cache=tmp_path / "cache")
    monkeypatch.setattr(
        runs, "study", lambda *_, **__: lambda: None
    )  # in a process of its own; here the page is the subject
    shown = made("busiest-expert", Session(runs, Selection({}), lambda: None))
    runs.jobs.close()
    assert question in str(shown.main[1].object)
    assert len(shown.main) == 4
    monkeypatch.setattr(registry, "_built_in", lambda: iter(()))  # the other studies take a while
    registry.records.cache_clear()
    write_report(opened, tmp_path / "report.html")
    assert "Busiest expert and wrong answers" in (tmp_path / "report.md").read_text()
    assert 'id="busiest-expert_change_change"' in (tmp_path / "report.html").read_text()
    assert list(paper.figures_of_run(opened)[0]) == ["busiest-expert_change_change"]


def test_an_experiment_of_one_module_runs_by_its_name(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("experiment.md")
    assert "scaled-sinks" in run(capsys, "study", "--help")[1]
    words = ["study", "scaled-sinks", DEMO, "--model", "nano", "--dtype", "float32", "--sequences", "60", "--out"]
    code, text, err = run(capsys, *words, str(tmp_path / "out"), "--option", "scale=1")
    assert code == 0, err
    assert re.search("layer 0: (no effect of 0.1 or more|the same change of 0.00 in all 20 prompts)", text)
    datasets = load(tmp_path / "out")["scaled-sinks"]
    assert float(abs(datasets["sinks"]["change"]).max()) < 1e-4
    assert wb.figures.scaled_sinks.gallery(datasets)["sinks"].draw().data
    code, _, err = run(capsys, *words, str(tmp_path / "no"), "--option", "scale=0")
    assert (code, err.count("\n")) == (2, 1)
    code, _, err = run(capsys, *words, str(tmp_path / "no"), "--option", "factor=2")
    assert "has no option 'factor'; it has seed, scale" in err


def test_a_broken_package_is_skipped_with_a_warning(install: Install) -> None:
    install("study.md", **{'"busiest-expert",': '"routing",'})
    with pytest.warns(UserWarning, match="skipped busiest_expert: the name 'routing' is taken"):
        assert registry.find("routing").module == "workbench.studies.routing"
    with pytest.raises(InputError, match="busiest-expert"):
        registry.find("busiest-expert")


def test_the_page_of_studies_lists_the_registry() -> None:
    text = (HOWTO.parent / "studies.md").read_text()
    assert commands_page.studies_table() in text


def _missing_names(text: str) -> list[str]:
    """Return names and files in backticks that neither the sources nor the tests contain."""
    root = HOWTO.parents[1]
    folders = ("kernels", "hooks", "workbench", "dashboards", "data", "tests")
    files = [path for folder in folders for path in (root / folder).rglob("*.py") if path != Path(__file__)]
    source = "\n".join(path.read_text() for path in files)
    missing = []
    for quoted in re.findall(r"`([^`\n]+)`", text):
        if quoted.startswith("@") or "NAME" in quoted or quoted.startswith("workbench bench"):
            continue
        if re.fullmatch(r"[\w./]+\.(py|md)", quoted):
            beside = [path for path in files if path.name == quoted]
            missing += [quoted] * (not beside and not (root / quoted).exists())
        elif (name := re.match(r"\w+(?:\.\w+)*", quoted)) and not re.search(rf"\b{name[0].split('.')[-1]}\b", source):
            missing.append(quoted)
    return missing


@pytest.mark.parametrize(
    ("page", "names"),
    [  # names that are replaced by others as negative controls
        ("docs/howto/hook.md", ("hook_mlp_in", "hooks/names.py")),
        ("docs/howto/kernel.md", ("on_device_of_first", "kernels/norm.py", "CompileCase")),
        ("docs/howto/reader.md", ("LazyTensor", "workbench/model/names.py")),
        ("docs/howto/model-family.md", ("checkpoint.py",)),
        ("CONTRIBUTING.md", ("tests/test_architecture.py",)),
    ],
)
def test_the_names_of_a_page_exist(page: str, names: tuple[str, ...]) -> None:
    text = (HOWTO.parents[1] / page).read_text()
    assert _missing_names(text) == []
    for name in names:
        stem, point, ending = name.partition(".")
        assert _missing_names(text.replace(name, f"{stem}_renamed{point}{ending}")), name
