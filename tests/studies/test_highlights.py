"""Highlights: planted differences are found, unverified and unpaired ones are not, and sentences state intervals."""

import numpy as np
import xarray as xr

from workbench.studies.contrast import contrast
from workbench.studies.effort import gain
from workbench.studies.highlights import accuracy_sentences, highlights, untested
from workbench.studies.synthetic import planted_tokens


def _compared(what: str, **planted: object) -> dict[str, dict[str, xr.Dataset]]:
    run = planted_tokens(n_prompts=25, **planted)  # type: ignore[arg-type]
    return {"channels": {"compared": contrast(run, what, "channel", "analysis", "final")}}


def test_a_planted_difference_comes_first_with_its_interval() -> None:
    results = _compared("experts", expert_shift={"final": 0.4}) | {"sinks": _compared("sink")["channels"]}
    (first, *_) = highlights(results)
    assert (first.cell["expert"], first.study) == (0, "channels")
    assert first.low <= first.difference <= first.high < 0
    assert f"{100 * first.difference:+.1f} [{100 * first.low:+.1f}, {100 * first.high:+.1f}] points" in first.sentence
    assert "within 25 prompts" in first.sentence
    assert first.sentence.endswith("at equal position.")


def test_null_data_has_no_highlights() -> None:
    assert highlights(_compared("sink")) == []


def test_what_position_explains_is_no_highlight() -> None:
    results = _compared("sink", position_slope=0.05)
    naive = results["channels"]["compared"].sel(control="none")
    assert naive["different"].any(), "position makes the channels differ within prompts"
    assert highlights(results) == []
    # negative control: without the check at equal position, the confounded difference is reported
    broken = {"channels": {"compared": results["channels"]["compared"].sel(control=["none"])}}
    assert highlights(broken)


def test_an_unpaired_difference_is_no_highlight() -> None:
    results = _compared("experts", expert_shift={"final": 0.4})
    results["channels"]["compared"].attrs["paired"] = 0
    assert highlights(results) == []


def test_the_same_comparison_of_two_studies_appears_once() -> None:
    (sets,) = _compared("experts", expert_shift={"final": 0.4}).values()
    assert len(highlights({"channels": sets, "routing": sets})) == 1


def test_differences_are_ordered_by_their_nearest_limit_relative_to_the_layer() -> None:
    sets = {}
    for name, shift in (("weak", 0.2), ("strong", 0.5)):
        ds = _compared("experts", expert_shift={"final": shift})["channels"]["compared"]
        ds.attrs["a"] = name
        sets[name] = ds
    assert [h.dataset for h in highlights({"channels": sets})] == ["strong", "weak"]


def test_a_quantity_without_cells_has_a_sentence_of_its_own() -> None:
    ds = _compared("experts", expert_shift={"final": 0.4})["channels"]["compared"].isel(layer=0, expert=0, drop=True)
    ds.attrs["what"] = "entropy"
    (only,) = highlights({"channels": {"entropy": ds}})
    assert only.cell == {}
    assert only.sentence.startswith("Entropy of the prediction ")


def _effort_results(gain_per_step: float) -> dict[str, dict[str, xr.Dataset]]:
    run = planted_tokens(n_prompts=80, gain=gain_per_step)
    table = run.sequences.assign(analysis=run.sequences["length"] - run.sequences["n_prompt"])
    return {"effort": {"cost": xr.Dataset(), "gain": gain(run, table, ["low", "medium", "high"])}}


def test_the_gain_of_accuracy_is_called_a_rise_only_where_its_interval_excludes_zero() -> None:
    (rise,) = accuracy_sentences(_effort_results(0.25))
    assert rise.startswith("Accuracy rises from low to high effort by ")
    (none,) = accuracy_sentences(_effort_results(0.0))
    assert none.startswith("No change of accuracy is shown from low to high effort")
    assert accuracy_sentences({}) == []


def test_what_cannot_be_tested_is_listed() -> None:
    results = _compared("experts", expert_shift={"final": 0.4})
    ds = results["channels"]["compared"]
    assert untested(results) == []
    ds.attrs["summary"] += "\nSkipped: commentary, as it has no tokens."
    ds["low"] = ds["low"].where(ds["control"] == "none", np.nan)
    skipped, too_few = untested(results)
    assert skipped == "commentary, as it has no tokens."
    assert too_few.startswith(f"{ds.attrs['title']}, at equal position: ")


def test_a_highlight_states_where_equal_position_was_not_tested() -> None:
    results = _compared("experts", expert_shift={"final": 0.4})
    ds = results["channels"]["compared"]
    for name in ("low", "high", "difference"):
        ds[name] = ds[name].where(ds["control"] == "none", np.nan)
    assert highlights(results)[0].sentence.endswith("; not tested at equal position.")
    assert highlights(results, most=0) == []
