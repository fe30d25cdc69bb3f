"""The experiment of the Jacobian lens: a Jacobian planted in one group is found, and none where both have the same."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.experiments.test_jacobians import WIDE, linear_model
from workbench.errors import InputError
from workbench.experiments import jacobian_lens
from workbench.experiments.jacobian_lens import COMPARISONS, experiment
from workbench.experiments.jacobians import fit_jacobian_lens
from workbench.experiments.lens import TunedLens, logit_lens
from workbench.figures.jacobian_lens import gallery
from workbench.harmony.transcripts import Transcript
from workbench.model.transformer import GptOss

pytestmark = pytest.mark.filterwarnings("ignore:only .* prompts")
FLAG = 0  # the dimension of the stream that decides whether the second layer writes
OPTIONS: dict[str, Any] = {"by": "effort", "skip_first": 2, "batch": 32}


@pytest.fixture(scope="module")
def rows() -> list[Transcript]:
    """Ten prompts with a sequence of tokens below 50 at low effort, and one of tokens from 50 on at high effort."""
    rng = np.random.default_rng(0)
    return [
        Transcript(f"{n}/{effort}", f"prompt {n}", effort, rng.integers(first, first + 50, 9).astype(np.uint32), 3)
        for n in range(10)
        for effort, first in (("low", 0), ("high", 50))
    ]


def model_that_writes(low: bool, high: bool) -> GptOss:
    """Every token attends to itself or to the sink alone, as its flag sets; what it writes is linear in its stream."""
    model = linear_model(windows=(1, 1))
    model.ln_final.weight.fill_(WIDE**0.5)
    model.embed.weight[:, FLAG] = -1.0
    model.embed.weight[:50, FLAG], model.embed.weight[50:100, FLAG] = 2.0 * low - 1, 2.0 * high - 1
    model.blocks[0].attn.o.weight.zero_()
    model.blocks[0].attn.o.bias.zero_()
    attn = model.blocks[1].attn
    attn.sinks.zero_()
    attn.q.bias.fill_(20.0)
    attn.k.weight[:, FLAG] = 20.0
    for bias in (attn.v.bias, attn.o.bias):
        bias.zero_()
    return model


def test_a_group_whose_jacobian_is_another_is_found(rows: list[Transcript]) -> None:
    result = experiment(model_that_writes(low=True, high=False), rows, tuned_steps=3, **OPTIONS)
    lenses, comparisons = result["lenses"], result["comparisons"]
    own = lenses["divergence"].sel(lens="Jacobian lens of the group")
    np.testing.assert_allclose(own, 0, atol=1e-6)  # each group is linear
    assert (lenses["agreement"].sel(lens="Jacobian lens of the group") == 1).all()
    for which in COMPARISONS[1:]:
        assert (comparisons["change"].sel(which=which) < -0.01).all()
        assert (comparisons["q"].sel(which=which) <= 0.05).all()
    logit = lenses["divergence"].sel(lens="logit lens")
    assert float(logit.sel(group="high").max()) < 1e-6, "a layer that writes nothing has a Jacobian of 1"
    assert float(logit.sel(group="low").min()) > 0.01
    assert lenses["divergence"].sel(lens="tuned lens").notnull().all()
    for which in COMPARISONS[1:]:
        assert (
            f"{which}: nearer to the model's own prediction in 2 and farther in 0 of 2" in comparisons.attrs["summary"]
        )
    assert list(gallery(result)) == ["lenses_high", "lenses_low", *(f"comparisons_{which}" for which in COMPARISONS)]
    assert all(item.draw().data and len(item.table()) for item in gallery(result).values())


def test_groups_with_the_same_jacobian_do_not_differ(rows: list[Transcript]) -> None:
    """Negative control of the experiment: the Jacobian lens is better than the logit lens, and no group has its own."""
    result = experiment(model_that_writes(low=True, high=True), rows, tuned_steps=0, **OPTIONS)
    change = result["comparisons"]["change"]
    np.testing.assert_allclose(change.sel(which=list(COMPARISONS[1:])), 0, atol=1e-6)
    assert (change.sel(which=COMPARISONS[0]) < -0.01).all()
    assert result["lenses"]["divergence"].sel(lens="tuned lens").isnull().all()


def test_prompts_that_fit_the_lenses_are_not_read(rows: list[Transcript], monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, read = jacobian_lens._halves(rows, np.random.default_rng(0))
    assert {row.prompt_id for row in fitted} | {row.prompt_id for row in read} == {row.prompt_id for row in rows}
    assert not {row.prompt_id for row in fitted} & {row.prompt_id for row in read}
    used: list[str] = []
    fit = jacobian_lens.fit_jacobian_lenses
    monkeypatch.setattr(
        jacobian_lens, "fit_jacobian_lenses", lambda m, r, **kw: used.extend(x.id for x in r) or fit(m, r, **kw)
    )
    experiment(model_that_writes(low=True, high=True), rows, tuned_steps=0, **OPTIONS)
    assert used == [row.id for row in fitted]


def test_wrong_options_and_too_few_prompts_are_refused(rows: list[Transcript]) -> None:
    model = model_that_writes(low=True, high=True)
    with pytest.raises(InputError, match="by='task'"):
        experiment(model, rows, by="task")
    with pytest.raises(InputError, match="tuned_steps=-1"):
        experiment(model, rows, tuned_steps=-1)
    with pytest.raises(InputError, match="no group by effort has a lens and 5 prompts"):
        experiment(model, rows[:8], tuned_steps=0, **OPTIONS)


def test_a_saved_lens_is_read_in_place_of_a_fit(rows: list[Transcript], tmp_path: Path) -> None:
    model, folder = model_that_writes(low=True, high=False), tmp_path / "lenses"
    fitted = experiment(model, rows, tuned_steps=0, save=str(folder), **OPTIONS)
    assert sorted(path.name for path in folder.iterdir()) == ["all.pt", "high.pt", "low.pt"]
    read = experiment(model, rows, tuned_steps=0, jacobian=str(folder / "all.pt"), **OPTIONS)
    all_tokens = [one["lenses"]["divergence"].sel(lens="Jacobian lens") for one in (fitted, read)]
    np.testing.assert_allclose(*all_tokens, atol=1e-3)  # the file is float16
    other = experiment(model, rows, tuned_steps=0, jacobian=str(folder / "high.pt"), **OPTIONS)
    assert abs(other["lenses"]["divergence"].sel(lens="Jacobian lens") - all_tokens[0]).max() > 0.01
    assert read["lenses"]["divergence"].sel(lens="Jacobian lens of the group").isnull().all()
    assert read["comparisons"]["change"].sel(which=COMPARISONS[0]).notnull().all()
    assert "all.pt, fitted to 10 prompts" in read["lenses"].attrs["summary"]
    assert "group's" not in read["comparisons"].attrs["summary"]
    assert all(item.draw().data and len(item.table()) for item in gallery(read).values())
    for wrong in ({"save": str(folder)}, {"save": "x", "jacobian": str(folder / "all.pt")}):
        with pytest.raises(InputError, match=r"exists: choose a new folder|no Jacobian lens is fitted"):
            experiment(model, rows, tuned_steps=0, **wrong, **OPTIONS)


@pytest.mark.parametrize("effort", ["../../outside", "a/b"])
def test_an_effort_that_leads_out_of_the_folder_is_refused_before_the_fit(
    effort: str, rows: list[Transcript], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The effort of a sequence, which names a file, is a text of a run that somebody else may have written."""
    hostile = [replace(row, effort=effort) for row in rows]
    monkeypatch.setattr(jacobian_lens, "fit_jacobian_lenses", None)
    with pytest.raises(InputError, match="cannot be the name of a file"):
        experiment(
            model_that_writes(low=True, high=True), hostile, tuned_steps=0, save=str(tmp_path / "new"), **OPTIONS
        )
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is not a folder"):
        experiment(model_that_writes(low=True, high=True), rows, save=str(tmp_path / "file" / "new"), **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_lens_of_some_layers_is_read_in_these(rows: list[Transcript], tmp_path: Path) -> None:
    model = model_that_writes(low=True, high=True)
    tokens = torch.from_numpy(np.stack([row.tokens.astype(np.int64) for row in rows]))
    last = model.cfg.n_layers - 1
    fit_jacobian_lens(model, tokens, layers=[last - 1], skip_first=2).save(tmp_path / "some.pt")
    result = experiment(model, rows, tuned_steps=0, jacobian=str(tmp_path / "some.pt"), **OPTIONS)
    assert result["lenses"]["layer"].values.tolist() == [last - 1]
    assert result["lenses"]["divergence"].sel(lens=["logit lens", "Jacobian lens"]).notnull().all()


def test_agreement_has_an_interval_within_its_bounds(recwarn: pytest.WarningsRecorder) -> None:
    """All of twelve prompts agree with one lens, and one of them does not with another.

    Negative control: the interval of a mean, which there is not where all agree, and which leaves the bounds.
    """
    readings = np.full((2, len(jacobian_lens.LENSES), 1, 12), 0.3)
    readings[1] = 1.0
    readings[1, 1, :, 0] = 0.0
    names, fits = [f"p{i}" for i in range(12)], {"all": SimpleNamespace(n_prompts=12)}
    results = jacobian_lens._results({"low": readings}, {"low": names}, fits, [0], "", 0)  # type: ignore[arg-type]
    low, high = (results["lenses"][f"agreement_{end}"].values[:, 0, 0] for end in ("low", "high"))
    assert 0.6 < low[0] < high[0] == 1
    assert low[1] < 11 / 12 < high[1] == 1
    plain = jacobian_lens.mean_effect(readings[1, :2, 0], names)
    assert np.isnan(plain.low[0]), "negative control"
    assert plain.high[1] > 1


def test_several_lenses_are_read_in_one_pass_of_a_sequence(rows: list[Transcript]) -> None:
    """What each lens reads is what `logit_lens` returns, which runs the model for every lens: the negative control."""
    model, passes = model_that_writes(low=True, high=False), []
    tokens = torch.from_numpy(rows[0].tokens.astype(np.int64))[None]
    fitted = fit_jacobian_lens(model, tokens, skip_first=2)
    lenses = jacobian_lens._Lenses(TunedLens.identity(model), {"all": fitted})
    model.embed.register_forward_hook(lambda *_: passes.append(1))
    mask = np.arange(len(rows[0].tokens)) > 2
    divergence, agreement = jacobian_lens._readings(model, [(rows[0], mask)], lenses, "low", ["low"])[..., 0]
    assert len(passes) == 1
    wanted: list[dict[str, Any]] = [{}, {"tuned": lenses.tuned}, {"jacobian": fitted}]  # in the order of LENSES
    for i, option in enumerate(wanted):
        one = logit_lens(model, tokens, at=np.flatnonzero(mask).tolist(), of=0, **option)
        layers = (one["after"].values == "mlp") & np.isin(one["layer"].values, lenses.layers(model.cfg.n_layers - 1))
        np.testing.assert_array_equal(divergence[i], one["kl"].isel(depth=layers).mean("point"))
        same = one["top"].isel(depth=layers) == one["top"].isel(depth=-1)
        np.testing.assert_array_equal(agreement[i], same.mean("point"))
    assert len(passes) == 1 + len(wanted)
