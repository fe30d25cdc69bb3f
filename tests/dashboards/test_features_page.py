"""The features page: frequencies by channel and the strongest tokens are those of a loop over the record."""

import json
import re
import time
from pathlib import Path

import numpy as np
import panel as pn
import pytest
import torch
import xarray as xr
from playwright.sync_api import Browser, expect
from typer.testing import CliRunner

import workbench as wb
from tests.capture.test_feature_lists import HOOK, write_sae
from tests.dashboards.browsing import Session as Browsing
from tests.dashboards.browsing import serve, stop
from workbench.cli import app
from workbench.dashboards import feature_ablation, feature_details, features_page
from workbench.dashboards.pages import absent_pages, made
from workbench.dashboards.session import Session
from workbench.dashboards.state import RunRegistry, Selection
from workbench.errors import InputError
from workbench.experiments import expert_logits
from workbench.experiments.feature_ablation import measure
from workbench.figures import feature_examples as figures
from workbench.harmony.labels import CHANNELS
from workbench.hooks.sae import load_sae
from workbench.runs import Run, conversations
from workbench.studies import feature_examples, feature_labels

PROMPTS = [
    [
        {"role": "user", "content": f"{a}+{b}"},
        {"role": "assistant", "channel": "analysis", "content": f"{a}+{b}={a + b};"},
        {"role": "assistant", "channel": "final", "content": str(a + b)},
    ]
    for a, b in ((2, 3), (4, 5), (6, 1))
]


def channel_names(data: xr.Dataset) -> np.ndarray:
    """The channel of each token as text."""
    channel = data["channel"].values
    return channel.astype(str) if channel.dtype.kind in "OU" else np.array(CHANNELS)[channel]


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with lists of examples, and the same features at every token."""
    folder = tmp_path_factory.mktemp("listed")
    rows = [{"id": f"s{i}", "prompt_id": f"s{i}", "effort": "high", "messages": m} for i, m in enumerate(PROMPTS)]
    model = wb.load("nano", dtype=torch.float32, device="cpu")
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_sae(folder / "sae", model.cfg.d_model)
    every = wb.Recorder(
        "sae_features", hook="hook_resid_post", reduce=load_sae(path).encode, dims=("feature",), layers="2"
    )
    record = ["routing", f"features:{path}", every]
    return wb.capture(model, folder / "answers.jsonl", folder / "run.zarr", record=record)


def test_lists_of_examples_are_shown_as_the_record_of_every_token_is(listed: Run) -> None:
    assert features_page.names(listed) == [HOOK, "sae_features"]
    assert features_page.layers_of(listed, HOOK) == ["2"]
    table, same = (features_page.by_channel(listed, name, 0) for name in (HOOK, "sae_features"))
    assert len(table) > 5
    assert table["feature"].tolist() == same["feature"].tolist()
    np.testing.assert_allclose(table.drop(columns="feature"), same.drop(columns="feature"), atol=0.011)
    feature = int(table["feature"].iloc[0])
    ds = feature_examples.load(listed, [feature])
    strongest = features_page.examples(listed, "sae_features", 0, feature)[0]
    rows = [row for c in ds["channel"].values for row in features_page.listed_rows(ds, "top", c)]
    best = max(rows, key=lambda row: row["activation"])
    assert best["activation"] == pytest.approx(strongest["value"], rel=1e-3)
    assert (best["sequence"], best["position"]) == (strongest["sequence"], strongest["position"])
    other = feature_examples.load(listed, [int(table["feature"].iloc[1])])
    assert not np.array_equal(other["top_activation"], ds["top_activation"]), "negative control: another feature"
    session = Session(RunRegistry([Path(listed.path)]), Selection({}), lambda: None)
    assert "features" not in absent_pages(session)
    assert made("features", session).sidebar[0].options == [HOOK, "sae_features"]
    session.registry.jobs.close()


def test_densities_and_activations_of_lists_are_those_of_every_token(listed: Run) -> None:
    table = features_page.by_channel(listed, HOOK, 0)
    n = int(table.attrs["features"])
    assert len(table) <= n == 24
    ds = feature_details.shares(table, n)
    feature = int(table.loc[table["all content (%)"].idxmin(), "feature"])
    data = listed.dataset[["sae_features", "channel"]].compute()
    values, channel = data["sae_features"].sel(layer=2).values.reshape(-1, 24)[:, feature], channel_names(data)
    for name in ds["channel"].values.tolist():
        own = values[channel == name]
        assert float(ds["share"].sel(feature=feature, channel=name)) == pytest.approx((own > 0).mean(), abs=1e-6)
    sampled, weights, is_sample = feature_details.activations(listed, HOOK, 0, feature, 10**6)
    every, ones, complete = feature_details.activations(listed, "sae_features", 0, feature, 10**6)
    assert (is_sample, complete) == (True, False)
    content = values[channel != "frame"]
    np.testing.assert_allclose(np.sort(every), np.sort(content[content > 0]), rtol=1e-3)
    assert weights.sum() == pytest.approx(ones.sum()), "the sample stands for all tokens that have the feature"
    assert np.isin(np.round(sampled, 2), np.round(every, 2)).mean() > 0.9
    other = feature_details.activations(listed, "sae_features", 0, int(table["feature"].iloc[0]), 10**6)[0]
    assert len(other) != len(every) or not np.allclose(other, every), "negative control: another feature"


def test_histograms_count_every_feature_and_token_once() -> None:
    share = np.array([[0.1, 0.01, 0.0, 0.5], [0.2, 0.0, 0.0, 0.001]])
    coords = {"channel": ["analysis", "final"], "feature": np.arange(4)}
    ds = xr.Dataset({"share": (("channel", "feature"), share)}, coords)
    drawn = figures.density_histogram(ds, chosen=3)
    counts = {trace.name: sum(trace.y[1:-1:2]) for trace in drawn.data}
    assert counts == {"analysis": 3, "final": 2}
    assert (
        "4 features; 1 never active in analysis; 2 never active in final; dotted: feature 3"
        in drawn.layout.title.subtitle.text
    )
    assert [line.x0 for line in drawn.layout.shapes] == [0.5, 0.001]
    bars = figures.activation_histogram(np.array([1.0, 2.0, 2.0]), np.array([1.0, 4.0, 4.0]), feature=3, sampled=True)
    assert np.nansum(bars.data[0].y) == 9, "each value stands for as many tokens as its weight"
    assert "random sample of 3 of 9 active tokens" in bars.layout.title.subtitle.text
    none = figures.activation_histogram(np.empty(0), np.empty(0), feature=3, sampled=False)
    assert np.nansum(none.data[0].y) == 0, "negative control: a feature that is never active"
    figures.density_histogram(ds.isel(feature=[2]))  # none is active


def test_automatic_labels_are_the_strongest_tokens(listed: Run) -> None:
    labels, same = (feature_labels.automatic(listed, name) for name in (HOOK, "sae_features"))
    data = listed.dataset[["sae_features", "channel", "id"]].compute()
    outside = channel_names(data) == "frame"
    words = conversations.tokenizer(listed, None)
    for feature in range(24):
        own = np.where(outside, 0, data["sae_features"].sel(layer=2).values.reshape(-1, 24)[:, feature])
        best = words.decode([int(data["id"].values[own.argmax()])]) if own.max() > 0 else None
        assert labels[feature].startswith(repr(best)) if best is not None else labels[feature] == ""
        assert same[feature].split(" ")[0] == labels[feature].split(" ")[0]
    assert len(set(labels)) > 3, "negative control: features differ"


def test_a_label_of_a_person_is_stored_shown_and_found(listed: Run) -> None:
    table = features_page.by_channel(listed, HOOK, 0)
    feature = int(table["feature"].iloc[2])
    assert feature_labels.read(listed) == {}
    registry = RunRegistry([Path(listed.path)])
    path = registry.put_feature_label(registry.names[0], HOOK, 2, feature, "carry\n digit <b>")
    assert path.name == "run.zarr.feature-labels.jsonl"
    assert feature_labels.read(listed) == {(HOOK, 2, feature): "carry digit <b>"}
    every = feature_details.described(table, {feature: "carry digit <b>"}, feature_labels.automatic(listed, HOOK), None)
    assert feature_details.matching(every, "CARRY")["feature"].tolist() == [feature]
    assert feature in feature_details.matching(every, str(feature))["feature"].tolist()
    assert len(feature_details.matching(every, " ")) == len(every)
    assert feature_details.matching(every, "no such label").empty, "negative control"
    path.write_text('{"name": "x"}\n')
    with pytest.raises(InputError, match=r"line 1: expected an object"):
        feature_labels.read(listed)
    with pytest.raises(InputError):
        registry.put_feature_label(registry.names[0], HOOK, 2, feature, "other")
    assert path.read_text() == '{"name": "x"}\n', "a file that holds something else is left as it is"
    lines = [f'{{"name": "x", "layer": 2, "feature": {n}, "label": "a"}}\n' for n in (7, 8, 7)]
    path.write_text("".join(lines[:2]))
    assert len(feature_labels.read(listed)) == 2, "negative control: different features"
    path.write_text("".join(lines))
    with pytest.raises(InputError, match=r"line 3: feature 7 of x, layer 2, has a label already: remove one"):
        feature_labels.read(listed)
    path.unlink()
    registry.put_feature_label(registry.names[0], HOOK, 2, feature, "")
    assert feature_labels.read(listed) == {}
    path.unlink()
    closed = RunRegistry([Path(listed.path)], editable=False)
    with pytest.raises(InputError, match="cannot be changed here"):
        closed.put_feature_label(closed.names[0], HOOK, 2, feature, "x")
    for one in (registry, closed):
        one.jobs.close()


def test_direct_effects_are_shown_once_they_are_stored_for_the_autoencoder(listed: Run, tmp_path: Path) -> None:
    session = Session(RunRegistry([Path(listed.path)]), Selection({}), lambda: None)
    assert feature_details.stored_effects(session, HOOK, "2", 24) is None
    missing = feature_details.logit_effects(session, None, 3)
    assert "--option sae=FOLDER" in str(missing.object)
    folder = Path(listed.path).parent
    arguments = ["study", "expert-logits", str(listed.path), "--model", "nano", "--sequences", "2"]
    arguments += ["--out", str(folder / "logits"), "--option", f"sae={folder / 'sae'}"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    effects = feature_details.stored_effects(session, HOOK, "2", 24)
    assert effects is not None
    model = wb.load("nano", dtype=torch.float32, device="cpu")
    wanted = expert_logits.feature_logits(model, load_sae(folder / "sae"))
    np.testing.assert_allclose(effects["top_logit"], wanted["top_logit"], atol=0.05)
    table = features_page.by_channel(listed, HOOK, 0)
    shown = feature_details.described(table, {}, [""] * 24, effects)
    first = int(table["feature"].iloc[0])
    assert shown["raises"].iloc[0].startswith(repr(str(effects["top_text"].values[first, 0])))
    assert feature_details.stored_effects(session, "sae_features", "2", 24) is not None
    assert feature_details.stored_effects(session, "sae_features", "1", 24) is None, "negative control: another layer"
    assert feature_details.stored_effects(session, HOOK, "2", 23) is None, "negative control: another autoencoder"
    session.registry.jobs.close()


def test_a_feature_is_ablated_by_a_click_and_a_link_opens_the_results(listed: Run, tmp_path: Path) -> None:
    folder, digest = Path(listed.path).parent / "sae", listed.spec.features[0].digest
    registry = RunRegistry([Path(listed.path)], cache=tmp_path, autoencoders={digest: folder})
    session = Session(registry, Selection({}), lambda: None)
    (button,) = feature_ablation.section(session, HOOK, 9).select(pn.widgets.Button)
    button.clicks += 1
    assert session.choice.text("ablated") == "9"
    ask = registry.feature_ablation(session.name, folder, 9)
    for _ in range(1200):
        if (answer := ask()).datasets is not None or answer.reason:
            break
        time.sleep(0.1)
    assert answer.datasets is not None, answer.reason
    (ds,) = answer.datasets.values()
    model = wb.load("nano", dtype=torch.float32, device="cpu")
    wanted = measure(model, load_sae(folder), listed, 9)
    np.testing.assert_allclose(ds["change"], wanted["change"], atol=1e-4)
    linked = feature_ablation.section(session, HOOK, 9)  # the address has the feature
    texts = " ".join(str(pane.object) for pane in linked.select(pn.pane.HTML))
    assert "Without the feature, at its largest activations" in [card.title for card in linked.select(pn.Card)]
    assert "the log-probability of the next token changes by" in texts
    assert "-0.00<" not in texts
    assert f"{wanted['lowered_logit'].values[0, 0]:.3f}" in texts
    other = feature_ablation.section(session, HOOK, 10)
    assert not other.select(pn.Card), "negative control: another feature is not ablated by the link"
    registry.jobs.close()


def test_the_options_that_an_ablation_needs_are_named(listed: Run) -> None:
    for given in ({}, {"0" * 16: Path("elsewhere")}):  # nothing, and another autoencoder
        registry = RunRegistry([Path(listed.path)], autoencoders=given)
        session = Session(registry, Selection({"ablated": "9"}), lambda: None)
        shown = feature_ablation.section(session, HOOK, 9)
        assert not shown.select(pn.widgets.Button)
        assert "--model nano --sae NAME=FOLDER" in str(shown[0].object)
        registry.jobs.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("features")
    directions = torch.randn(128, 6, generator=torch.Generator().manual_seed(0)) / 10

    def encode(x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ directions).relu()

    record = wb.Recorder("sae_features", hook="hook_resid_post", reduce=encode, dims=("feature",), layers="1-2")
    rows = [{"id": f"s{i}", "prompt_id": f"s{i}", "effort": "high", "messages": m} for i, m in enumerate(PROMPTS)]
    model = wb.load("nano", dtype=torch.float32, device="cpu")
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return wb.capture(model, folder / "answers.jsonl", folder / "run.zarr", record=["routing", record])


def test_frequencies_are_those_of_the_record(run: Run, demo_run: Path) -> None:
    assert features_page.names(run) == ["sae_features"]
    assert features_page.names(wb.open_run(demo_run)) == []
    table = features_page.by_channel(run, "sae_features", 1).set_index("feature")
    data = run.dataset[["sae_features", "channel"]].compute()
    values = data["sae_features"].sel(layer=2).values if "layer" in data["sae_features"].dims else None
    values = data["sae_features"].values[-1] if values is None else values
    channel = channel_names(data)
    for feature in table.index:
        share = 100 * (values[channel == "analysis", feature] > 0).mean()
        assert table.loc[feature, "analysis (%)"] == pytest.approx(share, abs=0.01)
    gaps = (table["analysis (%)"] - table["final (%)"]).abs().tolist()
    assert gaps == sorted(gaps, reverse=True)
    other = features_page.by_channel(run, "sae_features", 0).set_index("feature")
    assert not np.allclose(other["analysis (%)"].reindex(table.index), table["analysis (%)"]), (
        "negative control: a layer"
    )


def test_the_strongest_tokens_are_found_with_the_values_around_them(run: Run) -> None:
    data = run.dataset[["sae_features", "sequence", "position", "id"]].compute()
    values = data["sae_features"].sel(layer=1).values[:, 3].astype(np.float32)
    sequence, position = data["sequence"].values, data["position"].values
    strongest = features_page.examples(run, "sae_features", 0, 3)
    assert strongest[0]["value"] == pytest.approx(values.max(), rel=1e-3)
    assert strongest[0]["sequence"] == int(sequence[values.argmax()])
    assert len({row["sequence"] for row in strongest}) == len(strongest)
    for row in strongest:
        around = (sequence == row["sequence"]) & (position >= row["start"])
        around &= position < row["start"] + len(row["ids"])
        assert row["ids"] == data["id"].values[around].tolist()
        np.testing.assert_allclose(row["values"], values[around], rtol=1e-3)
    other = features_page.examples(run, "sae_features", 1, 3)
    assert other[0]["value"] != strongest[0]["value"], "negative control: another layer"


def test_the_random_sample_is_of_tokens_that_have_the_feature(run: Run) -> None:
    data = run.dataset[["sae_features", "sequence", "position"]].compute()
    values = data["sae_features"].sel(layer=1).values[:, 3].astype(np.float32)
    sampled = features_page.examples(run, "sae_features", 0, 3, "random")
    assert len(sampled) == len(PROMPTS)
    for row in sampled:
        own = (data["sequence"].values == row["sequence"]) & (data["position"].values == row["position"])
        assert values[own].item() == pytest.approx(row["value"], rel=1e-3)
        assert row["value"] > 0
    assert sampled == features_page.examples(run, "sae_features", 0, 3, "random"), "the same sample again"
    top = features_page.examples(run, "sae_features", 0, 3)
    assert {row["position"] for row in sampled} != {row["position"] for row in top}, "negative control: the largest"


def test_a_feature_is_found_by_its_label_in_the_browser(listed: Run, browser: Browser) -> None:
    """The label is saved on the page; the search for it shows this feature alone, and its link reopens the search."""
    feature = int(features_page.by_channel(listed, HOOK, 0)["feature"].iloc[1])
    server, url = serve(str(listed.path))
    try:
        session = Browsing(browser, f"{url}/features?feature={feature}")
        page = session.page
        expect(page.get_by_role("heading", name=re.compile(f"Feature {feature}: "))).to_be_visible()
        expect(page.get_by_text("Activation density of features")).to_be_visible()
        expect(page.get_by_text(f"Activations of feature {feature}")).to_be_visible()
        page.get_by_label("Label of this feature").fill("carry digit")
        page.get_by_role("button", name="Save label").click()
        expect(page.get_by_text("Saved in run.zarr.feature-labels.jsonl")).to_be_visible()
        page.get_by_label("Find features").fill("Carry")
        page.get_by_label("Find features").press("Enter")
        expect(page.get_by_text("1 of 1 feature with a label or token that contains 'Carry'")).to_be_visible()
        page.wait_for_url(re.compile("words=Carry"))
        again = Browsing(browser, page.url)
        expect(again.page.get_by_text("1 of 1 feature with a label or token that contains 'Carry'")).to_be_visible()
        expect(again.page.get_by_role("heading", name=f"Feature {feature}: carry digit")).to_be_visible()
        again.page.get_by_label("Find features").fill("no such label")
        again.page.get_by_label("Find features").press("Enter")
        expect(again.page.get_by_role("heading", name="No matching features")).to_be_visible()
        assert session.errors == session.foreign == again.errors == []
    finally:
        stop(server)
        feature_labels.path_of(listed).unlink(missing_ok=True)
