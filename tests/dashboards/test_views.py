"""What pages say is what the run holds; no widget, no browser."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import workbench as wb
from tests.conftest import DATA
from workbench import harmony
from workbench.dashboards import views
from workbench.dashboards.app import _access
from workbench.dashboards.state import Shelf
from workbench.dashboards.transcript import data_of, frame, tokenizer_of
from workbench.errors import InputError
from workbench.runs import Run


@pytest.fixture(scope="module")
def run() -> Run:
    return wb.open_run(DATA / "demo.zarr")


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf([DATA / "demo.zarr"])


def test_an_expert_s_tokens_are_those_that_went_to_it(run: Run) -> None:
    table = views.top_tokens(run, 1, 5, str, rows=1000)
    data = run.dataset[["id", "experts"]].compute()
    hit = (data["experts"].values[1] == 5).any(-1)
    every, chosen = Counter(data["id"].values.tolist()), Counter(data["id"].values[hit].tolist())
    assert len(table) == sum(n >= 5 for n in chosen.values())
    for row in table.head(10).to_dict("records"):
        token = int(row["token"])
        assert row["times"] == chosen[token]
        assert row["lift"] == pytest.approx(chosen[token] / every[token] / hit.mean(), abs=1e-3)
        assert f"[{token}]" in row["for example"]


def test_where_an_expert_acts_and_with_whom(shelf: Shelf) -> None:
    study = shelf.study("routing", "demo")
    table = views.where_it_acts(study, 2, 3).set_index("channel")
    wanted = float(study["load"]["share"].sel(layer=2, expert=3, channel="final", effort="high")) * 16
    assert table.loc["final", "high"] == pytest.approx(wanted, abs=0.01)
    partners = views.partners(study, "final", 2, 3)
    assert 3 not in set(partners["with expert"])
    assert (np.diff(partners["lift"]) <= 0).all()
    assert views.transitions(study, "final", 0) is not None
    assert views.transitions(study, "final", 3) is None
    rows = study["together"]["next_given"].sel(channel="final").sum("expert_2")
    np.testing.assert_allclose(rows.where(rows > 0, 1), 1)


def test_token_counts_add_up(run: Run) -> None:
    table = views.token_counts(run)
    assert table["all"].sum() == run.dataset.sizes["token"]
    assert list(table.columns) == ["channel", "low", "medium", "high", "all"]


def test_conversations_are_found_by_task_effort_and_text(run: Run) -> None:
    found = views.conversations(run, "product", "high", "")
    assert len(found) == 20
    assert all(run.sequences.loc[i, "task"] == "product" for i in found.values())
    one = views.conversations(run, "all", "all", "product-07/")
    assert len(one) == 3
    assert views.conversations(run, "all", "all", "no such id") == {}


def test_a_conversation_s_page_holds_its_tokens_and_no_open_tag(run: Run) -> None:
    words = tokenizer_of(run.provenance["tokenizer"]["digest"])
    assert words is not None
    number = int(run.sequences.index[17])
    data = data_of(run, number, words)
    tokens = run.sequence(number).compute()
    assert "".join(data["texts"]) == words.decode(tokens["id"].values.tolist())
    assert np.array_equal(np.array(data["experts"]), tokens["experts"].values)
    page = frame(run, number, words)
    assert page.count("<iframe") == 1
    assert 'sandbox="allow-scripts"' in page
    assert "allow-same-origin" not in page


def test_a_vocabulary_that_nobody_has_shows_numbers(run: Run) -> None:
    assert tokenizer_of("unknown") is None
    assert tokenizer_of(harmony.tokenizer().digest) is not None
    assert data_of(run, int(run.sequences.index[0]), None)["texts"][0].startswith("⟨")


def test_two_sessions_wait_for_one_computation(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    made = []
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: shelf._once(("x",), "d", lambda: made.append(1) or object()), range(8)))
    assert len(made) == 1
    assert len({id(f) for f in found}) == 1


def test_who_may_enter_is_read_from_a_file(tmp_path: Path) -> None:
    assert _access(None) == {}
    file = tmp_path / "users.json"
    for content in ("", "[]", "{}", '{"a": 1}'):
        file.write_text(content)
        with pytest.raises(InputError, match="names and passwords"):
            _access(file)
    file.write_text(json.dumps({"ada": "secret"}))
    first, second = _access(file), _access(file)
    assert first["basic_auth"] == str(file)
    assert first["cookie_secret"] != second["cookie_secret"]
