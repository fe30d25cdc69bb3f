"""The how-to pages of everyday research: files, commands and Python of a page, executed in order."""

import ast
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

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


@pytest.mark.filterwarnings("ignore:only .* prompts")  # pages use few
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_as_a_reader_would_run_it(
    page: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    names: dict[str, Any] = {"__name__": "__main__"}
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
                code, _, err = command(capsys, *words)
                assert code == 0, (line, err)
    if page in CHECKS:
        CHECKS[page](names)


def test_a_private_name_is_noticed() -> None:
    assert private_names("run._visible") == ["_visible"]
