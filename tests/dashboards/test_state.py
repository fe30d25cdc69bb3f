"""The selection of a link, and what the sessions of a server share."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
import pytest

from tests.conftest import DATA
from workbench.dashboards import state
from workbench.dashboards.state import RunRegistry, Selection


def test_a_choice_survives_its_link_and_has_only_its_names() -> None:
    choice = Selection({"channel": "final", "effort": "<script>", "evil": "x", "layer": "3"})
    assert choice.get("channel", ["analysis", "final"]) == "final"
    assert choice.get("effort", ["low", "high"], "high") == "high"
    assert choice.get("expert", ["0", "1"]) == "0"
    assert choice.get("expert", []) == ""
    choice.put(channel="analysis", layer="")
    again = Selection(dict(parse_qsl(choice.query(theme="dark"))))
    assert (again.text("channel"), again.text("layer"), again.text("theme"), again.text("evil")) == (
        "analysis",
        "",
        "dark",
        "",
    )
    assert "<" not in choice.query()


def test_two_sessions_wait_for_one_computation() -> None:
    registry = RunRegistry([DATA / "demo.zarr"])
    made: list[None] = []
    with ThreadPoolExecutor(4) as pool:
        values = list(pool.map(lambda _: registry._once(("x",), "d", lambda: made.append(1) or object()), range(8)))
    assert len(made) == 1
    assert len({id(f) for f in values}) == 1


def test_costs_of_a_large_run_are_those_of_its_study_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = RunRegistry([DATA / "demo.zarr"], cache=tmp_path)
    (name,) = registry.names
    at_once = registry.ask_costs(name)().datasets
    assert at_once is not None, "negative control: a small run is not left for later"
    monkeypatch.setattr(state, "_LARGE", 1)
    ask = registry.ask_costs(name)
    assert ask().datasets is None
    while (answer := ask()).datasets is None and not answer.reason:
        time.sleep(0.1)
    registry.jobs.close()
    assert answer.datasets is not None, answer.reason
    for kind in ("cost", "gain"):
        for variable, values in at_once[kind].data_vars.items():
            np.testing.assert_allclose(answer.datasets[kind][variable].values, values, err_msg=str(variable))
