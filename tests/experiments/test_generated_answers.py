"""Generated answers: an expert that carries a behaviour is found among random ones; no change is no effect."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import workbench as wb
from tests.conftest import DATA
from workbench import harmony
from workbench.errors import InputError
from workbench.experiments import answer_measures, generated_answers
from workbench.experiments.answer_effects import behaviour, between_models
from workbench.experiments.answer_measures import generate_answers, measure
from workbench.experiments.from_run import transcripts
from workbench.experiments.random_controls import rank
from workbench.figures import generated_answers as figures
from workbench.harmony.transcripts import Transcript
from workbench.hooks.interventions import forbid, reweight
from workbench.model.transformer import GptOss

LAYER, EXPERT = 1, 3
FEW = pytest.mark.filterwarnings("ignore:only .* prompts")


@pytest.fixture(scope="module")
def rows() -> list[Transcript]:
    every = transcripts(wb.open_run(DATA / "demo.zarr"))
    return [row for row in every if row.effort == "low" and row.meta["task"] in ("recall", "reverse")][::5]


@contextmanager
def carried_by_an_expert(model: GptOss) -> Iterator[None]:
    """Every token goes to one expert; where it does not, its residual stream is turned around."""
    here: dict[str, torch.Tensor] = {}

    def promote(logits: torch.Tensor, hook: object) -> torch.Tensor:
        out = logits.clone()
        out[..., EXPERT] = logits.amax(-1) - 1e-3
        return out

    def chosen(x: torch.Tensor, hook: object) -> None:
        here["chosen"] = x

    def turn(x: torch.Tensor, hook: object) -> torch.Tensor:
        return torch.where((here["chosen"] == EXPERT).any(-1)[..., None], x, -x)

    at = f"blocks.{LAYER}"
    hooks = {"mlp.router.hook_out": promote, "mlp.hook_expert_indices": chosen, "hook_resid_post": turn}
    with model.hooks(fwd_hooks=[(f"{at}.{name}", hook) for name, hook in hooks.items()]):
        yield


@FEW
def test_an_expert_that_carries_the_behaviour_is_found_among_random_ones(nano: GptOss, rows: list[Transcript]) -> None:
    others = [forbid(layer, [e]) for layer, e in np.ndindex(2, 12) if (layer, e) != (LAYER, EXPERT)][:20]
    recipe = {"carrier": forbid(LAYER, [EXPERT])}
    with carried_by_an_expert(nano):
        result = behaviour(nano, rows[:5], recipe, controls={"carrier": others}, max_new_tokens=4)
    same = result.sel(measure="same answer", intervention="carrier")
    assert float(same["change"]) < -0.8
    assert float(same["p_family"]) <= 0.05
    random = same["random"].values
    assert rank(random[0], random[1:]).p > 0.05, "the negative control: an ordinary expert among the others"
    assert "same answer" in result.attrs["summary"]
    assert "beyond random controls" in result.attrs["summary"]
    drawn = figures.gallery({"answers": result})
    assert "answers_same_answer" in drawn
    assert all(item.draw().data and len(item.table()) == 1 for item in drawn.values())


def test_gates_times_one_change_nothing_and_every_measure_has_its_zero(nano: GptOss, rows: list[Transcript]) -> None:
    base = generate_answers(nano, rows[:6], max_new_tokens=6)
    unchanged = measure(nano, rows[:6], base, reweight(1, [0, 1, 2], 1.0), max_new_tokens=6)
    np.testing.assert_array_equal(np.nan_to_num(unchanged), 0)
    changed = measure(nano, rows[:6], base, reweight(range(4), range(16), 0.0), max_new_tokens=6)
    by_name = dict(zip(answer_measures.MEASURES, changed, strict=True))
    assert by_name["same answer"].min() == -1
    assert by_name["tokens before divergence"].mean() < 0
    assert by_name["routing flips"].mean() > 0


def test_routing_flips_are_those_of_the_answer() -> None:
    """Planted: experts differ where the answer is predicted, or in the prompt before. Answers differ at token 2.

    Negative control: with the prompt counted, as before, flips of the prompt alone would be 9 of 11.
    """
    row = Transcript("a", "a", "", np.zeros(10, np.int32), 10)
    base, other = (answer_measures.Answer([7, i], "x", 0, False) for i in (1, 2))
    before = np.zeros((1, 12, 2), np.uint8)
    for at, wanted in ((slice(0, 9), 0.0), (slice(9, 11), 1.0), (slice(9, 10), 0.5), (slice(11, 12), 0.0)):
        after = before.copy()
        after[:, at] = 1
        changes = answer_measures.measure_changes([row], [base], [other], [before], [after])
        assert dict(zip(answer_measures.MEASURES, changes, strict=True))["routing flips"][0] == wanted


def test_analysis_that_does_not_end_is_counted_to_the_last_token(nano: GptOss) -> None:
    """Negative control: a message that is cut off has no stop token, whose position −1 would make the number wrong."""
    row = next(r for r in transcripts(wb.open_run(DATA / "demo.zarr")) if r.id == "product-00/high/0")
    (cut,) = generate_answers(nano, [row], max_new_tokens=7)
    assert cut.text is None
    assert cut.analysis_tokens == 7 - 3, "channel mark, channel and message mark are no content"
    (answer,) = generate_answers(nano, [row], max_new_tokens=100)
    analysis = nano.tokenizer.decode(answer.ids).split("<|message|>")[1].split("<|end|>")[0]
    assert answer.analysis_tokens == len(nano.tokenizer.encode(analysis))


def test_refusals_and_divergence_are_counted(nano: GptOss) -> None:
    assert answer_measures._common([1, 2, 3], [1, 2, 4]) == 2
    assert answer_measures._common([1, 2], [1, 2, 4]) == 2
    pattern = answer_measures.re.compile(answer_measures.REFUSAL)
    assert all(pattern.match(text) for text in ("i'm sorry, but", "i cannot help", "as an ai"))
    assert not any(pattern.match(text) for text in ("i canter", "the answer: i can't", "sorry day"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"doses": "0,much"}, "doses='0,much': expected numbers"),
        ({"doses": "1,1"}, "expected different finite numbers"),
        ({"doses": "-1"}, r"doses=\[-1.0\]: gate weights"),
        ({"change": "sinks"}, "change='sinks': use experts or direction"),
        ({"group": "poetry"}, "group='poetry': the sequences have facts, strings"),
        ({"controls": 5}, "controls=5: at least 20"),
    ],
)
def test_wrong_options_are_refused(
    nano: GptOss, rows: list[Transcript], options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        generated_answers.experiment(nano, rows, **options)  # type: ignore[arg-type]


@FEW
def test_two_models_are_compared_by_their_answers(nano: GptOss, rows: list[Transcript]) -> None:
    """The negative control is the model itself, which changes nothing."""
    other = wb.load("nano", dtype=torch.float32)
    other.add_hook(f"blocks.{LAYER}.hook_resid_post", lambda x, hook: -x)
    result = between_models(nano, other, rows[:6], max_new_tokens=4).isel(intervention=0)
    assert float(result["high"].sel(measure="same answer")) < 0
    assert float(result["change"].sel(measure="tokens before divergence")) < -0.5
    assert float(result["change"].sel(measure="routing flips")) > 0.1
    assert "random" not in result.attrs["summary"]
    same = between_models(nano, nano, rows[:6], max_new_tokens=4)
    np.testing.assert_array_equal(np.nan_to_num(same["change"].values), 0)
    assert all(item.draw().data for item in figures.gallery({"answers": same}).values())
    with pytest.raises(InputError, match="4 prompts, and an interval needs 5"):
        between_models(nano, nano, rows[:4])


def test_analysis_tokens_of_an_answer_that_was_cut_off_are_counted_to_its_end(nano: GptOss) -> None:
    row = next(r for r in transcripts(wb.open_run(DATA / "demo.zarr")) if r.effort == "high")
    (complete,) = generate_answers(nano, [row])
    (cut,) = generate_answers(nano, [row], max_new_tokens=10)
    assert cut.ids == complete.ids[:10]
    assert 0 < cut.analysis_tokens < complete.analysis_tokens
    ids = np.array([*row.tokens[: row.n_prompt], *cut.ids])
    message = harmony.label(ids, tokenizer=nano.tokenizer, n_prompt=row.n_prompt).messages[-1]
    assert message.stop - message.content < 0, "negative control: there is no stop token"
