"""Tokens and conversations that the search finds are those of the run's own arrays."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest

import workbench as wb
from tests.conftest import DATA
from workbench import harmony
from workbench.dashboards import search
from workbench.harmony.labels import CHANNELS
from workbench.runs import Run


@pytest.fixture(scope="module")
def run() -> Run:
    return wb.open_run(DATA / "demo.zarr")


def test_tokens_of_a_selection_are_counted_in_it_alone(run: Run) -> None:
    within = search.TokenSelection(channel="final", effort="high", task="product")
    table = search.head_tokens(run, 1, 5, str, rows=1000, within=within)
    data = run.dataset[["id", "sink", "channel", "sequence"]].compute()
    of = run.sequences.loc[data["sequence"].values]
    inside = (data["channel"].values == CHANNELS.index("final")) & (of["effort"] == "high") & (of["task"] == "product")
    mass = data["sink"].values[1][:, 5].astype(np.float32)
    hit = inside.to_numpy() & (mass > np.quantile(mass[inside.to_numpy()], 0.9))
    every = Counter(data["id"].values[mass > np.quantile(mass, 0.9)].tolist())
    chosen = Counter(data["id"].values[hit].tolist())
    counted = {int(row["token"]): row["occurrences"] for row in table.to_dict("records")}
    assert counted == {token: n for token, n in chosen.items() if n >= 5}
    assert counted != {token: n for token, n in every.items() if n >= 5}, "negative control: without the selection"


def test_a_head_s_tokens_and_its_curve_are_those_of_its_sinks(run: Run) -> None:
    data = run.dataset[["id", "sink", "channel", "position"]].compute()
    mass = data["sink"].values[2][:, 3].astype(np.float64)
    curve = search.head_by_position(run, 2, 3)
    final, where = data["channel"].values == CHANNELS.index("final"), data["position"].values
    for low, high in ((16, 32), (32, 64)):
        inside = final & (where >= low) & (where < high)
        assert curve.loc[low, "final"] == pytest.approx(mass[inside].mean(), rel=1e-5)
    table = search.head_tokens(run, 2, 3, str)
    assert (np.diff(table["lift"]) <= 0).all()
    best = data["id"].values == int(table["token"].iloc[0])
    assert mass[best].mean() > np.quantile(mass, 0.8)


def test_tokens_with_high_sink_attention_are_those_that_are_more_frequent_among_them(run: Run) -> None:
    data = run.dataset[["id", "sink"]].compute()
    mass = data["sink"].values[2][:, 3].astype(np.float32)
    high = mass > np.quantile(mass, 0.9)
    often, every = (Counter(ids.tolist()) for ids in (data["id"].values[high], data["id"].values))
    table = search.head_tokens(run, 2, 3, str, rows=1000)
    assert (table["lift"] > 1).all()
    assert len(table) > 5
    # the edge of the top 10 % is that of the first block, so that a token near it may be on either side
    rarer = {token for token, n in often.items() if n >= 5 and n / every[token] < 0.9 * high.mean()}
    assert rarer, "negative control: without the condition these would be listed"
    assert not rarer & set(table["token"].astype(int))


def test_conversations_are_found_by_task_effort_and_text(run: Run) -> None:
    matching = search.conversations(run, task="product", effort="high")
    assert len(matching) == 20
    assert all(run.sequences.loc[i, "task"] == "product" for i in matching.values())
    assert len(search.conversations(run, text="product-07/")) == 3
    assert search.conversations(run, text="no such text anywhere") == {}
    by_text = search.conversations(run, text="REASONING: HIGH")
    assert set(by_text.values()) == set(run.sequences.index[run.sequences["effort"] == "high"])
    assert search.conversations(run, text="reasoning: high", channel="final") == {}
    assert len(search.conversations(run, text="reasoning")) == len(run.sequences) > 500, "complete, however many"


def test_conversations_are_ordered_by_their_length(run: Run) -> None:
    lengths = run.sequences["length"]
    for order, longest_first in (("longest", True), ("shortest", False)):
        ordered = search.conversations(run, effort="high", order=order)
        expected = sorted(run.sequences.index[run.sequences["effort"] == "high"], key=lambda n: lengths[n])
        assert [lengths[n] for n in ordered.values()] == [lengths[n] for n in expected[:: -1 if longest_first else 1]]
        assert all(label.endswith(f" ({lengths[n]:,})") for label, n in ordered.items())
    captured = list(search.conversations(run, effort="high").values())
    assert captured == sorted(captured), "negative control: as captured"
    assert [lengths[n] for n in captured] != sorted(lengths[captured])


def test_conversations_are_ordered_by_an_expert_s_share(run: Run) -> None:
    ordered = list(search.conversations(run, channel="analysis", expert=(1, 5)).values())
    data = run.dataset[["sequence", "channel", "experts"]].compute()
    inside = data["channel"].values == CHANNELS.index("analysis")
    hit = (data["experts"].values[1] == 5).any(-1)[inside]
    share = pd.Series(hit).groupby(data["sequence"].values[inside]).mean()
    assert ordered == [i for i in ordered if share[i] > 0]
    assert len(ordered) == (share > 0).sum()
    np.testing.assert_allclose(share[ordered].to_numpy(), np.sort(share)[::-1][: len(ordered)])


def test_a_character_of_several_tokens_is_shown_once() -> None:
    words = harmony.tokenizer()
    text = "naïve 🦜🦜 日本語 𓀀 \ufffd ok"
    ids = words.encode(text)
    shown = search.texts(ids, words)
    assert len(shown) == len(ids)
    assert "".join(shown) == text
    assert "" in shown  # some character here takes more than one token
    alone = [words.decode([i]) for i in ids]
    assert "".join(alone) != text  # and one by one they cannot be read
    broken = [ids[i] for i in range(len(ids)) if shown[i] == ""][:1] * 9
    assert len(search.texts(broken, words)) == 9
    assert "".join(search.texts(broken, words))
