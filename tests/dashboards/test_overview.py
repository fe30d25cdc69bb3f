"""The overview's sentence, numbers, problems and answers agree with the run's tables and the studies' datasets."""

from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import workbench as wb
from workbench.dashboards import expert_sections, overview
from workbench.dashboards.session import Session
from workbench.dashboards.state import RunRegistry, Selection
from workbench.research.intervention import Intervention
from workbench.research.recipe import Recipe


def test_the_sentence_and_the_numbers_are_those_of_the_tables(demo_run: Path) -> None:
    run = wb.open_run(demo_run)
    assert overview.sentence(run).startswith(
        "600 conversations of 200 prompts at low, medium, high effort, recorded with nano (4 layers, 16 experts, 4 per "
    )
    table = run.sequences
    low, high = (100 * table.loc[table["effort"] == e, "correct"].mean() for e in ("low", "high"))
    shown = overview.numbers(run)
    assert shown["tokens"] == f"{int(table['length'].sum()):,}"
    assert shown["accuracy, low → high effort"] == f"{low:.1f} % → {high:.1f} %"


def test_problems_are_listed_and_none_is_said_only_where_there_is_none() -> None:
    flags, efforts = ["", "truncated", "irregular truncated"], ["low", "high", "low"]
    table = pd.DataFrame({"correct": [1, -1, -1], "flags": flags, "effort": efforts})
    bad = SimpleNamespace(sequences=table, progress=(1, 3), exclusion="")
    told = overview.problems(bad)  # type: ignore[arg-type]
    for part in (
        "1 of 3 units",
        "2 of 3 conversations are not graded",
        "2 of 3 conversations: truncated (low 1, high 1).",
        "1 of 3 conversations: irregular (low 1).",
    ):
        assert part in told
    good = SimpleNamespace(sequences=table.assign(correct=1, flags=""), progress=(3, 3), exclusion="")
    assert "No irregular" in overview.problems(good)  # type: ignore[arg-type]
    assert "No irregular" not in told


def contrast(digest: str) -> xr.Dataset:
    """Two cells of which one differs, without and with control of position."""
    shape = (2, 1, 2)

    def both(a: float, b: float) -> np.ndarray:
        return np.broadcast_to(np.array([a, b]), shape).copy()

    cells = {"mean_a": both(0.1, 0.5), "mean_b": both(0.1, 0.2), "difference": both(0.0, 0.3)}
    cells |= {"low": both(-0.1, 0.2), "high": both(0.1, 0.4), "different": both(0, 1).astype(bool)}
    return xr.Dataset(
        {name: (("control", "layer", "expert"), values) for name, values in cells.items()}
        | {"prompts": (("control",), np.array([30, 20]))},
        {"control": ["none", "position"], "layer": [3], "expert": [4, 7]},
        {
            "what": "experts",
            "a": "analysis",
            "b": "final",
            "paired": 1,
            "title": "t",
            "summary": "",
            "run_digest": digest,
        },
    )


def test_an_answer_leads_to_the_cell_that_it_is_about(demo_run: Path) -> None:
    session = Session(RunRegistry([demo_run]), Selection({"theme": "dark"}), lambda: None)
    text = overview.answers(session, {"channels": {"routing": contrast("x")}})
    assert "50.0 % of routed slots in analysis" in text
    assert "theme=dark&amp;layer=3&amp;expert=7" in text
    assert "'>Layer 3, expert 7</a>: 50.0 %" in text, "the sentence begins with the link"
    assert "divided by the mean of the quantity in the layer" in text
    none = contrast("x")
    none["different"][:] = False
    assert "No difference was verified" in overview.answers(session, {"channels": {"routing": none}})


def test_loads_are_told_with_intervals_relative_to_uniform() -> None:
    share = np.full((2, 1, 1, 4), np.nan)
    share[0] = 0.5
    load = xr.Dataset(
        {
            n: (("channel", "effort", "layer", "expert"), share * f)
            for n, f in (("share", 1.0), ("share_low", 0.5), ("share_high", 1.5))
        },
        {"channel": ["final", "other"], "effort": ["low"], "layer": [0], "expert": range(4)},
    )
    table = expert_sections.load_table(load, 0, 2, 4)
    assert table.to_dict("records") == [{"channel": "final", "low": "2.00 [1.00, 3.00]"}]
    few = load.assign({name: load[name] * np.nan for name in ("share_low", "share_high")})  # too few prompts
    assert expert_sections.load_table(few, 0, 2, 4).to_dict("records") == [{"channel": "final", "low": "2.00"}]


@pytest.mark.parametrize(("channel", "tokens"), [("all", ["c", "a"]), ("frame", ["f"]), ("final", ["a"])])
def test_examples_are_those_of_the_channel_by_gate(channel: str, tokens: list[str]) -> None:
    def part(values: list[list[object]]) -> tuple[tuple[str, str], np.ndarray]:
        return ("channel", "example"), np.array(values, dtype=object)

    ds = xr.Dataset(
        {
            "top_sequence": part([[1, -1], [2, -1], [3, -1]]),
            "top_position": part([[4, -1], [5, -1], [6, -1]]),
            "top_gate": part([[0.9, 0], [0.3, 0], [0.7, 0]]),
            "top_token": part([["f", ""], ["a", ""], ["c", ""]]),
            "top_before": part([["", ""]] * 3),
            "top_after": part([["", ""]] * 3),
        },
        {"channel": ["frame", "final", "commentary"]},
    )
    assert [row["token"] for row in expert_sections.example_rows(ds, "top", channel)] == tokens


def test_the_gallery_has_the_strongest_example_of_each_expert_that_has_a_token() -> None:
    def part(values: Any, kind: type = object) -> tuple[tuple[str, ...], np.ndarray]:
        return ("channel", "layer", "expert", "example"), np.array(values, dtype=kind)[:, None, :, None]

    gates = [[0.9, 0.1, 0.0], [0.2, 0.4, 0.0], [0.5, 0.3, 0.0]]
    tokens = [["f", "f", ""], ["a", "b", ""], ["c", "d", ""]]
    ds = xr.Dataset(
        {
            "top_sequence": part([[1, 2, -1]] * 3, int),
            "top_gate": part(gates, float),
            "top_token": part(tokens),
            "top_before": part([["x", "y", ""]] * 3),
            "top_after": part([["", "", ""]] * 3),
            "channel_lift": (("channel", "layer", "expert"), np.array([[[1.0, 1, 1]], [[2, 0.5, 1]], [[3, 4, 1]]])),
        },
        {"channel": ["frame", "analysis", "final"], "layer": [0], "expert": [0, 1, 2]},
    )
    labels = pd.DataFrame({"layer": [0, 0], "expert": [1, 0], "label": ["second", "first"]})
    rows = expert_sections.gallery_table(ds, labels)
    assert rows["label"].tolist() == ["first", "second"], "an expert without a token has no row"
    assert rows["example"].tolist() == ["x[c]", "y[b]"], "frame tokens are not examples"
    assert rows["final (× mean load)"].tolist() == [3.0, 4.0]


def test_over_represented_tokens_are_those_whose_interval_excludes_zero() -> None:
    """An interval that includes zero, or has no limits, leaves a token out; it is counted."""
    rank = ("token_rank",)
    values = {"log_odds": [2.0, 3.0, 5.0, 1.0], "log_odds_low": [1.0, -0.5, 2.5, np.nan]}
    values |= {"log_odds_high": [3.0, 6.0, 7.0, np.nan]}
    ds = xr.Dataset({f"token_{name}": (rank, np.array(v)) for name, v in values.items()})
    texts = {"id": np.array([4, 5, 6, 7]), "text": np.array(["a", "b", "c", "d"])}
    counts = {name: np.array([30, 31, 32, 33]) for name in ("count", "prompts")}
    ds = ds.assign({f"token_{name}": (rank, v) for name, v in (texts | counts).items()})
    rows, omitted = expert_sections.tokens_table(ds)
    assert rows["token"].tolist() == ["c", "a"], "by the lower limit"
    assert omitted == 2
    shifted = ds.assign({f"token_log_odds{end}": ds[f"token_log_odds{end}"] + 1 for end in ("", "_low", "_high")})
    assert len(expert_sections.tokens_table(shifted)[0]) == 3, "negative control: no interval includes zero"


def test_the_link_to_live_is_a_recipe_that_forbids_the_expert(demo_run: Path) -> None:
    registry = RunRegistry([demo_run], model="nano")
    session = Session(registry, Selection({}), lambda: None)
    parts = {"sequence": 5, "position": 1, "gate": 0.5, "before": "", "token": "a", "after": ""}
    ds = xr.Dataset(
        {f"top_{name}": (("channel", "example"), np.array([[value]])) for name, value in parts.items()},
        {"channel": ["final"]},
    )
    (pane,) = expert_sections.forbid_link(session, ds, 1, 11)
    query = parse_qs(unescape(pane.object.split("href='")[1].split("'")[0]).partition("?")[2])
    recipe = Recipe.from_json(query["recipe"][0])
    assert recipe.interventions == (Intervention(kind="forbid", cells=((1, 11),)),)
    assert recipe.user in wb.open_run(demo_run).text(5)
    assert recipe.effort == wb.open_run(demo_run).sequences.loc[5, "effort"]
    without = Session(RunRegistry([demo_run]), Selection({}), lambda: None)
    assert expert_sections.forbid_link(without, ds, 1, 11) == [], "negative control: a dashboard without a model"
