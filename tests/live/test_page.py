"""The page without a browser: five viewers of one model, limits, continuing, editing, recipes, and leaving.

Also tests `workbench.live.recipe_card`.
"""

import json
import re
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from urllib.parse import parse_qs

import panel as pn
import pytest
import torch

import workbench as wb
from tests.conftest import DATA
from tests.model.conftest import BASE
from workbench.dashboards.app import pages
from workbench.dashboards.layout import PageTemplate
from workbench.dashboards.state import RunRegistry
from workbench.live.app import address_of_recipe, dashboard_page, live_page, recipe_of_address
from workbench.live.experiment import final_answer
from workbench.live.expert_map import shares_by_cell
from workbench.live.job_queue import Job, State
from workbench.live.model_server import Limits, ModelServer, Viewer
from workbench.live.page import LivePage
from workbench.live.study_command import study_command
from workbench.model.prompt_cache import installed_hooks
from workbench.model.transformer import GptOss
from workbench.research.recipe import Intervention, Recipe, Scope
from workbench.research.recipe_python import recipe_python
from workbench.research.steering_sources import SteeringSources

FORBID = Intervention("forbid", cells=tuple((1, e) for e in range(12)), scope=Scope(channel=("analysis",)))
RECIPE = Recipe(user="12+7", effort="medium", max_new_tokens=10, temperature=0.0)


@pytest.fixture(scope="module")
def nano() -> GptOss:
    model: GptOss = wb.load("nano", dtype=torch.float32)
    return model


@pytest.fixture
def server(nano: GptOss) -> Iterator[ModelServer]:
    made = ModelServer(nano, "nano", Limits(max_new_tokens=12, max_samples=2, max_seconds=600))
    yield made
    made.close()
    assert not installed_hooks(nano), "the model is as it was"


def page(server: ModelServer, recipe: Recipe = RECIPE) -> tuple[LivePage, list[Recipe]]:
    remembered: list[Recipe] = []
    return LivePage(server, recipe, "light", remembered.append), remembered


def until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("nothing happened for two minutes")


def finish(shown: LivePage) -> None:
    job = shown._job
    assert job is not None
    assert job.ended.wait(120)
    shown.refresh()


def test_five_viewers_get_their_own_answers_in_turn(nano: GptOss, server: ModelServer) -> None:
    texts = ["12+7", "3*4", "1+1", "20-4", "5*5"]
    viewers = [Viewer(server) for _ in texts]
    runs = [viewer.run(replace(RECIPE, user=text)) for viewer, text in zip(viewers, texts, strict=True)]
    order: list[int] = []
    until(lambda: _note_ended([job for job, _, _ in runs], order))
    assert order == [0, 1, 2, 3, 4]
    for text, (job, experiment, _) in zip(texts, runs, strict=True):
        prompt = replace(RECIPE, user=text).prompt_ids(nano)
        assert job.state is State.DONE
        assert experiment.original.rows == nano.generate([prompt], max_new_tokens=10)
    assert len({tuple(experiment.original.tokens) for _, experiment, _ in runs}) > 2


def _note_ended(jobs: list[Job], order: list[int]) -> bool:
    order += [i for i, job in enumerate(jobs) if job.ended.is_set() and i not in order]
    return len(order) == len(jobs)


def test_a_page_shows_both_answers_and_the_difference(server: ModelServer) -> None:
    shown, remembered = page(server, replace(RECIPE, interventions=(FORBID,), samples=2, temperature=1.0))
    shown.run()
    finish(shown)
    assert "Done." in shown._status.object
    assert all("lv-message" in pane.object for pane in shown._answers)
    assert "log-probability of the original answer" in shown._comparison.object
    assert "<th>original</th><th>edited</th>" in shown._comparison.object
    assert sum(map(sum, shown._map.load)) == pytest.approx(4)
    assert remembered == [shown.recipe()]
    shown._recipe_card.save_answers()
    rows = shown._recipe_card._saved_rows.value.splitlines()
    assert [json.loads(row)["id"] for row in rows] == [
        f"{a}/medium/{n}" for a in ("original", "edited") for n in (0, 1)
    ]
    assert shown._experiment is not None
    assert shown._experiment.edited is not None
    assert json.loads(rows[3])["tokens"][-len(shown._experiment.edited.rows[1]) :] == shown._experiment.edited.rows[1]
    shown._recipe_card.show_code(recipe_python)
    assert "forbid(1, [0, 1," in shown._recipe_card._copied.value


def test_the_answers_are_complete_before_the_page_shows_done(server: ModelServer) -> None:
    shown, _ = page(server)
    answers: list[str] = []
    shown._status.param.watch(lambda event: answers.append(shown._answers[0].object), "object")
    shown.run()
    job = shown._job
    assert job is not None
    assert job.ended.wait(120)
    job.ended.clear()  # as between the last token and the end of the job
    shown.refresh()
    assert "Generating the original answer" in shown._status.object
    job.ended.set()
    shown.refresh()
    assert "Done." in shown._status.object
    assert answers[-1] == shown._answers[0].object
    assert answers[0] != answers[-1], "negative control: the answer grew"


def test_an_answer_does_not_grow_beside_done_of_the_last_run(server: ModelServer) -> None:
    shown, _ = page(server)
    states: list[str] = []
    shown.run()
    job = shown._job
    assert job is not None
    assert job.ended.wait(120)
    shown.refresh()
    shown._answers[0].param.watch(lambda event: states.append(shown._status.object), "object")
    for ended, status in ((False, "Generating"), (True, "of the last run")):
        shown._answers[0].object, shown._status.object, shown._shown = "", "Done, of the last run", None
        (job.ended.set if ended else job.ended.clear)()
        shown.refresh()
        assert status in states[-1], "negative control: at its end the answer comes before the status"


def test_limits_and_errors_are_told(server: ModelServer) -> None:
    shown, _ = page(server)
    shown._tokens.high = 100
    shown._tokens.put(100)
    shown.run()
    finish(shown)
    assert "at most 12 new tokens; 100 were asked for" in shown._status.object
    shown._user.value = "<b>"
    shown.run()
    assert "cannot express the character &#x27;&lt;&#x27;" in shown._status.object
    other = page(server)[0]
    other._recipe_card._save_answers.clicks += 1
    assert "there is no answer yet" in other._recipe_card._status.object
    shown._add["forbid"].clicks += 1
    assert "no experts are selected" in shown._add_problem.object
    shown._map.chosen = [[9, 0]]
    shown._add_intervention("forbid")
    shown._user.value = "1+1"
    shown.run()
    finish(shown)
    assert "layers 0 to 3" in shown._status.object


def test_an_answer_is_continued_and_edited(nano: GptOss, server: ModelServer) -> None:
    shown, _ = page(server, replace(RECIPE, max_new_tokens=6))
    answer = nano.generate([RECIPE.prompt_ids(nano)], max_new_tokens=12)[0]
    shown.run()
    finish(shown)
    shown._tokens.widget.value = "x"
    shown.continue_answer()
    assert "New tokens &#x27;x&#x27;" in shown._status.object
    assert shown._begin.value == "", "what is refused changes nothing"
    shown._tokens.put(6)
    shown.continue_answer()
    finish(shown)
    assert shown._experiment is not None
    assert shown._begin.value == nano.tokenizer.decode(answer[:6])
    assert shown._experiment.original.tokens == answer[6:]
    shown.edit_answer()
    assert shown._begin.value == nano.tokenizer.decode(answer)
    assert shown.recipe().begin == shown._begin.value


def test_a_continued_answer_shows_its_beginning_and_another_message_removes_it(server: ModelServer) -> None:
    shown, _ = page(server, replace(RECIPE, max_new_tokens=6))
    shown.run()
    finish(shown)
    assert "The original answer was cut off after 6 new tokens" in shown._status.object
    first = shown._answers[0].object
    shown.continue_answer()
    finish(shown)
    assert shown._answers[0].object.count("lv-given") == first.count('title="token')
    assert "lv-given" not in first, "negative control: nothing was given"
    shown._user.value = "3*4"
    assert shown._begin.value == ""
    shown.run()
    finish(shown)
    shown.edit_answer()
    assert not shown._more.collapsed
    assert "Beginning of the answer" in shown._status.object
    edited = shown._begin.value
    shown._user.value = "5*5"
    assert shown._begin.value == edited, "what the viewer edits stays"


def test_empty_fields_and_prompts_without_room_are_refused(server: ModelServer) -> None:
    shown, _ = page(server)
    for field, text in ((shown._tokens, "New tokens is empty"), (shown._temperature, "Temperature is empty")):
        before, field.widget.value = field.widget.value, ""
        shown.run()
        assert text in shown._status.object
        field.widget.value = before
    shown._user.value = " "
    shown.run()
    assert "the user message is empty" in shown._status.object
    shown._user.value = "12+7" * 300
    shown.run()
    assert "the context of the model holds 1,024" in shown._status.object
    shown._user.value = "12+7"
    shown.run()
    finish(shown)
    assert "Done." in shown._status.object, "negative control: a prompt that fits is answered"
    shown._recipe_card._study.clicks += 1
    assert "there is no intervention to test" in shown._recipe_card._status.object


def test_the_usual_questions_are_the_defaults_of_cards(server: ModelServer) -> None:
    shown, _ = page(server)
    shown._add_intervention("knockout")
    shown._add_intervention("patch")
    shown._add_intervention("scale_heads")
    knockout, patch, heads = shown.recipe().interventions
    assert (knockout.scope.channel, knockout.keys.channel) == (("final",), ("analysis",))
    assert patch.source_effort == "high"
    assert heads.describe() == "ablate layer 2, head 0; acts on all tokens"


def test_a_head_is_ablated_by_its_card_and_by_the_link_to_it(nano: GptOss, server: ModelServer) -> None:
    shown, remembered = page(server)
    shown._add_intervention("scale_heads")
    card = shown._cards[0]
    card._layers.value, card._heads.value = "0", "1 3"
    shown.run()
    finish(shown)
    assert shown._experiment is not None
    assert shown._experiment.edited is not None
    changed, width = wb.load("nano", dtype=torch.float32), nano.cfg.d_head
    weight = changed.blocks[0].attn.o.weight.detach().clone()
    for head in (1, 3):
        weight[:, head * width : (head + 1) * width] = 0
    changed.blocks[0].attn.o.weight.data = weight
    want = changed.generate([shown.recipe().prompt_ids(nano)], max_new_tokens=10)
    assert shown._experiment.edited.rows == want
    assert want != shown._experiment.original.rows, "negative control: without the heads the answer is another"
    again, problem = recipe_of_address(parse_qs(address_of_recipe(remembered[0], "light"))["recipe"][0], server)
    assert (again, problem) == (shown.recipe(), "")
    linked, _ = page(server, again)
    assert [card.view.title for card in linked._cards] == ["Ablate or scale heads"]
    linked._recipe_card.show_code(recipe_python)
    assert "scale_heads([0], 0.0, [1, 3], tokens=None)" in linked._recipe_card._copied.value


def test_an_answer_becomes_a_turn_of_the_conversation(nano: GptOss, server: ModelServer) -> None:
    shown, _ = page(server, replace(RECIPE, effort="low", expected="19"))
    shown.next_turn()
    assert "no complete final answer yet" in shown._status.object
    shown.run()
    finish(shown)
    assert "correct" in shown._comparison.object
    experiment = shown._experiment
    assert experiment is not None
    answered = final_answer(experiment, experiment.original)
    assert answered
    shown.next_turn()
    assert (shown._user.value, shown._expected.value, shown._undo.visible) == ("", "", True)
    assert f">{answered}</div>" in shown._turns.object
    shown._user.value = "3*4"
    shown.run()
    finish(shown)
    messages = [("user", "12+7"), ("assistant", answered), ("user", "3*4")]
    prompt = wb.harmony.render(
        [{"role": role, "content": text} for role, text in messages], effort="low", tokenizer=nano.tokenizer
    )
    assert shown._experiment is not None
    assert shown._experiment.prompt == prompt
    assert shown._experiment.original.rows == nano.generate([prompt], max_new_tokens=10)
    assert shown._experiment.original.shared_tokens > 5, "what was read is not read again"
    assert Recipe.from_json(shown.recipe().to_json()).history == (("12+7", answered),)
    shown._undo.clicks += 1
    assert (shown.recipe().history, shown._undo.visible) == ((), False)


def test_cards_of_vectors_are_offered_where_the_server_has_some(nano: GptOss, server: ModelServer) -> None:
    assert {"vector", "feature"} & page(server)[0]._add.keys() == set()
    with_vector = ModelServer(
        nano, "nano", Limits(max_new_tokens=4), SteeringSources({"happy": torch.ones(nano.cfg.d_model)})
    )
    try:
        shown, _ = page(with_vector, replace(RECIPE, max_new_tokens=4))
        assert {"vector", "feature"} & shown._add.keys() == {"vector"}
        shown._add_intervention("vector")
        shown._add_intervention("patch")
        shown._cards[1]._effort.value = "same"
        shown.run()
        assert "names no other prompt" in shown._status.object
        shown._cards[1]._source.value = "34+5"
        shown.run()
        finish(shown)
        assert "Done." in shown._status.object
        assert [one.kind for one in shown.recipe().interventions] == ["vector", "patch"]
        shown._remove_card(shown._cards[1])
        shown._recipe_card.show_code(study_command)
        assert "--vector happy=happy.npy" in shown._recipe_card._copied.value
    finally:
        with_vector.close()


def test_a_recipe_is_loaded_from_a_file_and_a_broken_one_refused(server: ModelServer) -> None:
    shown, remembered = page(server)
    recipe = replace(RECIPE, user="3*4", top_k=4, interventions=(FORBID,))
    shown._recipe_card._load.value = recipe.to_json().encode()
    assert shown.recipe() == recipe
    assert remembered == [recipe]
    shown._recipe_card._load.value = b'{"recipe": 1, "user": 3}'
    assert "user is 3, expected str" in shown._recipe_card._status.object
    assert shown.recipe() == recipe
    shown._recipe_card.save()
    assert Recipe.from_json(shown._recipe_card._saved.value) == recipe


def test_a_viewer_who_leaves_ends_the_work_and_others_see_their_place(server: ModelServer) -> None:
    first, second = page(server)[0], page(server)[0]
    first.viewer.server.queue.submit(first.viewer.id, _endless())
    second.run()
    until(lambda: "Waiting: 1 request before this one." in (second.refresh() or second._status.object))
    first.viewer.leave()
    finish(second)
    assert "Done." in second._status.object
    endless = server.queue.submit(first.viewer.id, _endless())
    first._job, first._experiment = endless, second._experiment
    until(lambda: endless.state is State.RUNNING)
    first._stop.clicks += 1
    finish(first)
    assert "Stopped." in first._status.object


def _endless() -> Generator[None, None, None]:
    while True:
        time.sleep(0.01)
        yield


def test_the_map_has_no_cell_for_an_expert_that_a_layer_does_not_have() -> None:
    """Its share is None, and not 0, which an expert has that is there and is not used."""
    cfg = replace(BASE, n_layers=2, windows=(16, None), num_experts=4, layer_experts=(4, 2), experts_per_token=1)
    load = [[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    assert shares_by_cell(load, cfg) == [[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, None, None]]
    assert shares_by_cell(load, replace(cfg, layer_experts=None)) == load


def test_a_map_of_many_experts_has_almost_half_of_the_width(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def classes() -> list[str]:
        grid = page(server)[0].main()[0][0]
        return list(grid.css_classes)

    assert classes() == []  # negative control: 16 experts
    monkeypatch.setattr("workbench.live.page._FEW_EXPERTS", 15)
    assert classes() == ["lv-wide"]


def test_the_navigation_of_the_live_page_is_that_of_the_other_pages(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages without records are grey on the live page, too, and its address keeps what the other pages chose."""
    for name in ("add_periodic_callback", "on_session_destroyed"):  # there is no session
        monkeypatch.setattr(pn.state, name, lambda *_, **__: None)
    made = pages(RunRegistry([DATA / "demo.zarr"]), {"live": dashboard_page(server)})
    live, overview = (absent_links(made[page]()) for page in ("live", "overview"))
    assert live == overview
    assert "features" in live, "the run has no features"
    assert "experts" not in live, "negative control: it has routing"
    assert absent_links(live_page(server, {"features": "Features", "live": "Live"})()) == []
    query = address_of_recipe(RECIPE, "dark", {"run": "b", "channel": "final"})
    assert {"run", "channel", "theme", "recipe"} == parse_qs(query).keys()


def absent_links(template: PageTemplate) -> list[str]:
    """Return the addresses of the grey links of the navigation."""
    return re.findall(r'data-page="([^"]+)"[^>]*wb-absent', template.texts["page_links"])
