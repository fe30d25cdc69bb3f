"""The how-to pages of everyday research: files, commands and Python of a page, executed in order."""

import ast
import itertools
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest

import workbench as wb
from tests.capture.test_feature_lists import write_sae
from tests.cli.test_cli import run as command
from tests.conftest import DATA
from workbench.capture.shape_model import sample_transcripts
from workbench.experiments.from_run import transcripts
from workbench.harmony.transcripts import write_transcripts

HOWTO = Path(__file__).parents[1] / "docs" / "howto"
METHODS = Path(__file__).parents[1] / "notebooks" / "methods.ipynb"
PAGES = ["record.md", "everyday.md", "plan.md", "finetune-example.md", "../formats.md", "../nano.md", "../gallery.md"]
_BLOCK = re.compile(r'^```(python|bash|sh)(?: title="([^"]+)")?\n(.*?)^```', re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has: a run, its transcripts, prompts."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(DATA / "demo.zarr", folder / "run.zarr")
    rows = (DATA / "prompts.jsonl").read_text().splitlines()[::40]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    run = wb.open_run(folder / "run.zarr")
    conversations = [
        {"id": "c", "messages": [{"role": "user", "content": "2+3"}, {"role": "assistant", "content": "5"}]}
    ]
    (folder / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations))
    write_transcripts(folder / "for-gpt-oss.jsonl", sample_transcripts(wb.harmony.tokenizer(), 3, 100))
    write_sae(folder / "saes" / "layer2", d_in=128, d_sae=96)
    write_transcripts(folder / "answers.jsonl", transcripts(run, run.sequences.index[::8].tolist()))
    return folder


def private_names(code: str) -> list[str]:
    """Names of the workbench that a reader should not need: attributes that begin with one underscore."""
    names = (node.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute))
    return [name for name in names if name.startswith("_") and not name.startswith("__")]


def check_finetuning(names: dict[str, Any]) -> None:
    """What the worked example concludes, from its own numbers; negative controls are the base and the other adapter."""
    accuracy = {name: names[name].accuracy().iloc[0] for name in ("before", "after")}
    assert accuracy["before"]["accuracy_high"] < accuracy["after"]["accuracy_low"], "the task is learned"
    assert np.mean(names["marked"]) > 0.5, "the style is learned"
    same = {
        name: names[name].sel(measure="same answer", intervention="other model") for name in ("forgotten", "restyled")
    }
    assert all(float(one["high"]) < 0 for one in same.values()), "both change answers that were not taught"
    base = names["base"]
    for own, highest in ((names["moved"]["style"], 0.99), (wb.studies.compare.study(base, base), 1.0)):
        agreement = own["efforts"]["agreement"].sel(channel=["analysis", "final"]).values
        assert np.nanmin(agreement) > 0.5
        assert np.nanmax(agreement) <= highest
    assert np.nanmin(agreement) == 1, "the negative control: the base model beside itself"


CHECKS = {"finetune-example.md": check_finetuning}


def study_of_command(words: list[str]) -> tuple[str, dict[str, str]] | None:
    """Return the name of the study or experiment that a command line runs, and its options; None for other commands."""
    if words[:1] != ["study"]:
        return None
    options = dict(value.split("=", 1) for flag, value in itertools.pairwise(words) if flag == "--option")
    if "--sequences" in words:
        options["sequences"] = words[words.index("--sequences") + 1]
    return words[1], options


def studies_of_notebook(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Return the studies and experiments that a notebook runs by name, with their options as on a command line."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    calls = [node for cell in cells for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Call)]
    return [
        (
            ast.literal_eval(call.args[0]),
            {
                option.arg or "": str(ast.literal_eval(option.value))
                for option in call.keywords
                if option.arg != "store"
            },
        )
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id in ("run_study", "run_experiment")
    ]


@pytest.mark.filterwarnings("ignore:only .* prompts")  # pages use few
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_as_a_reader_would_run_it(
    page: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], long: bool
) -> None:
    """Without --long, a command is left out if the notebook of the same methods runs the same experiment."""
    monkeypatch.chdir(workplace)
    names: dict[str, Any] = {"__name__": "__main__"}
    elsewhere = [] if long or page != "../gallery.md" else studies_of_notebook(METHODS)
    left_out = 0
    for language, title, text in _BLOCK.findall((HOWTO / page).read_text()):
        if title:
            Path(title).write_text(text)
        elif language == "python":
            assert private_names(text) == []
            assert text.count("\n") <= 30, "a task takes at most 30 lines"
            exec(compile(text, page, "exec"), names)
        else:
            for line in text.replace("\\\n", " ").splitlines():
                _, *words = shlex.split(line, comments=True) or [""]
                if study_of_command(words) in elsewhere:
                    left_out += 1
                    continue
                code, _, err = command(capsys, *words)
                assert code == 0, (line, err)
    assert bool(left_out) == bool(elsewhere)
    if page in CHECKS:
        CHECKS[page](names)


def test_a_private_name_is_noticed() -> None:
    assert private_names("run._visible") == ["_visible"]


def test_a_command_and_a_notebook_with_other_options_are_not_the_same(tmp_path: Path) -> None:
    path = tmp_path / "one.ipynb"
    cell = nbformat.v4.new_code_cell('show(run_experiment("steering", model, run, sequences=5, doses="1"))')
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    same = shlex.split("study steering run.zarr --model nano --sequences 5 --option doses=1")
    assert study_of_command(same) in studies_of_notebook(path)
    for other in ("doses=2", "at=all"):
        assert study_of_command([*same[:-1], other]) not in studies_of_notebook(path)
    assert study_of_command(["info", "nano"]) not in studies_of_notebook(path)
