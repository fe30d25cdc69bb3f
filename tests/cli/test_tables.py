"""The summary in a terminal states what the run holds, as text."""

import json
import shutil
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

import workbench as wb
from tests.conftest import DATA
from tests.runs.conftest import make_older
from workbench.cli.tables import bars, summary
from workbench.errors import InputError


def printed(run) -> str:
    out = StringIO()
    Console(file=out, width=120).print(summary(run))
    return out.getvalue()


def test_the_tables_name_the_recorded_quantities():
    run = wb.open_run(DATA / "demo.zarr")
    text = printed(run)
    assert "nano: 4 layers of 16 experts" in text
    tokens = run.total("tokens")
    assert f"{int(tokens.sel(channel='analysis').sum()):,}" in text
    right = run.sequences.query("effort == 'low' and task == 'product'")["correct"].mean()
    assert f"product  │ {right:.2f}" in text
    data = run.dataset[["experts", "channel"]].compute()
    analysis = data["experts"].values[2][data["channel"].values == wb.harmony.CHANNELS.index("analysis")].ravel()
    share = np.bincount(analysis, minlength=16) / analysis.size
    assert f"2     │     {np.exp(-(share * np.log(share)).sum()):.1f} │ {bars(share * 4)} │" in text


def test_bars_are_as_high_as_their_numbers():
    assert bars([0, 0.001, 0.5, 1, 7]) == " ▁▄██"
    with pytest.raises(InputError, match="expected 0 to 1"):
        bars([-1])


def test_text_of_a_run_is_not_markup(tmp_path):
    copy = shutil.copytree(DATA / "demo.zarr", tmp_path / "[red]r.zarr")
    root = json.loads((copy / "zarr.json").read_text())
    root["attributes"]["checkpoint"]["name"] = "[bold]evil[/bold]"
    (copy / "zarr.json").write_text(json.dumps(root))
    make_older(copy)  # the checksums of a newer run would show that its attributes were changed
    with pytest.warns(UserWarning, match="has no checksums"):
        run = wb.open_run(copy)
    assert "[bold]evil[/bold]: 4 layers" in printed(run)
