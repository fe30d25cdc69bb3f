"""Wrong inputs in every field of every card: refused on the card in one line, and nothing that was there is lost."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import workbench as wb
from tests.research.test_steering_sources import write_sae
from workbench.live.cards import TITLES
from workbench.live.model_server import Limits, ModelServer
from workbench.live.page import LivePage
from workbench.research.intervention import CELL_KINDS, FACTOR_KINDS, HEAD_KINDS, KINDS, STRENGTH_KINDS
from workbench.research.recipe import Recipe
from workbench.research.steering_sources import SteeringSources, read_sources

RECIPE = Recipe(user="12+7", max_new_tokens=2)
HUGE = "9" * 5000
INDICES = ["x", "-1", "99", "0-1000", "3-1", HUGE]
POSITIONS = ["x", "-5", "1.5", HUGE]
STRENGTHS = ["", "x", "nan", "inf", "1e31", "0,5", HUGE]


def wrong_inputs() -> Iterator[Any]:
    """Yield a case for each kind: the wrong texts by the name of the card's field."""
    for kind in KINDS:
        texts: dict[str, list[str]] = {"scope._start": POSITIONS, "scope._stop": [*POSITIONS, "0"]}
        if kind in CELL_KINDS:
            texts["_cells"] = ["", "a:b", "-1:2", "99:3", "1:99", "1;3", "1:٣", f"1:{HUGE}"]
        else:
            texts["_layers"] = [*INDICES, *([] if kind == "feature" else [""])]
        if kind in ("forbid", "force"):
            texts["_cells"].append(" ".join(f"1:{expert}" for expert in range(16)))
        if kind in HEAD_KINDS:
            texts["_heads"] = INDICES
        if kind in STRENGTH_KINDS:
            texts["_strength"] = [*STRENGTHS, *(["-1"] if kind in FACTOR_KINDS else ["-1e31"])]
        if kind == "steer":
            texts["_toward"] = ["analysis", "low"]  # the same as away, and of another family
        if kind == "feature":
            texts["_feature"] = ["", "x", "-1", "8", HUGE]
        if kind == "patch":
            texts["_source"] = ["<b>", "x" * 9000]  # what the vocabulary lacks, and another length
        if kind == "knockout":
            texts |= {"keys._start": POSITIONS, "keys._stop": [*POSITIONS, "0"]}
        yield pytest.param(kind, texts, id=kind)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    model = wb.load("nano", dtype=torch.float32)
    folder = tmp_path_factory.mktemp("saes") / "toy"
    write_sae(folder, model.cfg.d_model)  # of three features
    sources = SteeringSources({"happy": torch.ones(model.cfg.d_model)}, read_sources(saes=[f"toy={folder}"]).saes)
    made = ModelServer(model, "nano", Limits(max_new_tokens=12), sources)
    yield made
    made.close()


def field_of(card: Any, name: str) -> Any:
    """Return the widget of a card by the name of its field, as "scope._start"."""
    for part in name.split("."):
        card = getattr(card, part)
    return getattr(card, "widget", card)


@pytest.mark.parametrize(("kind", "texts"), wrong_inputs())
def test_a_wrong_input_is_refused_on_its_card(server: ModelServer, kind: str, texts: dict[str, list[str]]) -> None:
    page = LivePage(server, RECIPE, "light", lambda _: None)
    for added in ("scale_sinks", kind):
        page._map.chosen = [[1, 3]]
        page._add_intervention(added)
    other, card = page._cards
    before = page.recipe()  # negative control: as it was added the card is accepted
    assert before.interventions[1].kind == kind
    for name, wrong in texts.items():
        field = field_of(card, name)
        right = field.value
        for text in wrong:
            field.value = text
            page.run()
            problem = card._problem.object
            assert "danger" in problem, f"{kind}, {name} = {text[:40]!r} was accepted"
            assert "\n" not in problem.strip()
            assert len(problem) < 400
            assert f"Intervention 2, {TITLES[kind]}: " in page._status.object
            assert (page._job, other._problem.object, field.value) == (None, "", text)
        assert not card.view.collapsed
        field.value = right
        assert page.recipe() == before
        assert card._problem.object == "", "what is right again is not marked any more"
    for button in (page._recipe_card._save, page._recipe_card._copy, page._recipe_card._study):
        field_of(card, "scope._stop").value = "x"
        button.clicks += 1
        assert "To position" in page._recipe_card._status.object


def test_a_scope_without_tokens_is_marked_on_its_card(server: ModelServer) -> None:
    page = LivePage(server, RECIPE, "light", lambda _: None)
    for _ in range(2):
        page._map.chosen = [[1, 3]]
        page._add_intervention("forbid")
    page._cards[1].scope._channels.value = ["commentary"]
    page.run()
    assert page._job is not None
    assert page._job.ended.wait(120)
    page.refresh()
    assert page._cards[0]._problem.object == "", "negative control: the other one acts on tokens"
    assert "No token of the edited answer" in page._cards[1]._problem.object


def test_a_direction_without_tokens_is_refused_on_its_card(server: ModelServer) -> None:
    page = LivePage(server, RECIPE, "light", lambda _: None)
    page._add_intervention("scale_sinks")
    page._add_intervention("steer")  # toward final, which two tokens do not reach
    page.run()
    assert page._job is not None
    assert page._job.ended.wait(120)
    page.refresh()
    assert "no token in the channel &#x27;final&#x27;" in page._cards[1]._problem.object
    assert "Intervention 2, Steer along a direction: " in page._status.object
    assert page._cards[0]._problem.object == ""
    assert "2 new tokens" in page._answers[0].object, "the original answer stays"


def test_a_folded_card_states_its_intervention_and_opens_where_it_is_refused(server: ModelServer) -> None:
    page = LivePage(server, RECIPE, "light", lambda _: None)
    page._add_intervention("scale_sinks")
    page._add_intervention("steer")
    first, second = page._cards
    assert (first.view.collapsed, second.view.collapsed) == (True, False)
    assert first.view.title == "Sinks of layer 0, 1, 2 × 0.5; acts on all tokens"
    assert second.view.title == "Steer along a direction"
    first._strength.widget.value = "x"
    page.run()
    assert (first.view.collapsed, first.view.title) == (False, "Scale sinks")
    first.fold()
    assert first.view.title == "Scale sinks: Strength &#x27;x&#x27;: expected a number from 0 to 1e30"
    again = LivePage(server, before_of(page), "light", lambda _: None)
    assert [card.view.collapsed for card in again._cards] == [True, False]


def before_of(page: LivePage) -> Recipe:
    """Return the recipe of a page after its first card was repaired."""
    page._cards[0]._strength.widget.value = "0.5"
    return page.recipe()
