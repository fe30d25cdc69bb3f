"""Experiments by name on nano: each states what it did, with intervals; what nano is known to do is found.

Also tests `workbench.experiments.expert_ablation`, `workbench.experiments.expert_forcing`,
`workbench.experiments.expert_reweighting`, `workbench.experiments.logit_attribution` and
`workbench.experiments.sink_ablation`.
"""

import re
import shlex

import numpy as np
import pytest

import workbench as wb
from tests.cli.running import run_command
from tests.conftest import DATA
from workbench import registry
from workbench.errors import InputError
from workbench.experiments import chain_of_thought, steering
from workbench.experiments.answer_measures import Answer
from workbench.experiments.expert_sets import named_experts
from workbench.experiments.from_run import transcripts
from workbench.experiments.registry import OUTPUTS, independent_rows, run_experiment
from workbench.registry import experiments
from workbench.studies import save
from workbench.studies.run_index import index_of


@pytest.fixture(scope="module")
def run():
    return wb.open_run(DATA / "demo.zarr")


FEW = pytest.mark.filterwarnings("ignore:only .* prompts")


def test_continuations_are_not_stored_in_the_run_or_in_its_place(run, nano):
    for store in (run.path, f"{run.path}/new.jsonl"):
        with pytest.raises(InputError, match=r"is an input|is inside the input"):
            run_experiment("sentence-importance", nano, run, store=str(store))


# docs/gallery.md runs these by name, and their own tests draw them
ON_THE_GALLERY_PAGE = (
    "expert-tracing",
    "generated-answers",
    "instruction-hierarchy",
    "jacobian-lens",
    "receiver-heads",
    "sentence-importance",
    "super-experts",
)
# these need more than a few prompts of a group
SEQUENCES = {
    "expert-ablation": 36,
    "expert-forcing": 36,
    "expert-reweighting": 36,
    "steering": 36,
    "logit-attribution": 36,
    "chain-of-thought": 18,
}


@FEW
@pytest.mark.slow
@pytest.mark.parametrize("name", [record.name for record in experiments() if record.name not in ON_THE_GALLERY_PAGE])
def test_every_experiment_has_a_summary_and_can_be_drawn_and_saved(name, run, nano, tmp_path, monkeypatch, long):
    record = registry.find(name)
    if not long:  # each dose is 21 passes over half of the sequences
        monkeypatch.setattr(steering, "DOSES", (-1.0, 1.0))
    options = {name: n for name, n in {"controls": 20, "routes": 2}.items() if name in record.options}
    result = run_experiment(name, nano, run, sequences=SEQUENCES.get(name, 12), **options)
    drawn = record.load_figures().gallery(result)
    assert {item.source.attrs["title"] for item in drawn.values()} == {ds.attrs["title"] for ds in result.values()}
    assert all(len(d.table()) and d.draw().data for d in drawn.values())
    for dataset in result.values():
        assert {
            "summary",
            "method",
            "not_controlled",
            "run_digest",
            "checkpoint_digest",
            "title",
            "sample",
        } <= dataset.attrs.keys()
    assert save(result, tmp_path)


@FEW
@pytest.mark.slow
def test_the_answer_of_nano_depends_on_its_analysis(run, nano):
    rows = transcripts(run)
    rows = [row for row in rows if row.meta.get("domain") == "arithmetic" and row.effort == "high"][:40]
    result = chain_of_thought.study(nano, rows[::4])
    assert float(result["same_high"].sel(change="removed")) < 0.4
    assert float(result["logprob_high"].sel(change="another prompt's")) < 0
    assert float(result["logprob_high"].sel(change="hidden in all layers")) < 0
    assert 0.2 < float(result["area"]) <= 1


def test_an_unchanged_analysis_changes_nothing(run, nano):
    """The oracle of the surgery: all of the analysis put back is the transcript, and the model answers as it did."""
    rows = [row for row in transcripts(run) if row.effort == "high"][:12]
    answered = chain_of_thought.answered_sequences(nano, rows)
    assert len(answered) >= 8
    for thought in answered:
        analysis = thought.row.tokens[thought.start : thought.stop]
        np.testing.assert_array_equal(chain_of_thought._with(thought, analysis).tokens, thought.row.tokens)
        text = nano.tokenizer.decode(thought.row.tokens[thought.content : thought.end].tolist())
        assert "<|" not in text
    answers = chain_of_thought._answers(nano, answered, [t.row for t in answered])
    wanted = [nano.tokenizer.decode(t.row.tokens[t.content : t.end].tolist()).strip() for t in answered]
    assert [answer.text for answer in answers] == wanted


@pytest.mark.filterwarnings("ignore:only .* prompts")
def test_answers_that_do_not_end_are_the_same_only_if_their_tokens_are(run, nano, monkeypatch):
    """Planted: every changed analysis gives another unfinished answer. Null: all give the same one.

    Negative control: two answers without a text compared by their texts, which would be the same.
    """
    rows = [row for row in transcripts(run) if row.effort == "high"][:30:3]
    n = len(chain_of_thought.answered_sequences(nano, rows))
    monkeypatch.setattr(chain_of_thought, "logprobs", lambda model, rows, of, *edits: np.zeros(len(rows)))

    def study(*changed_ids: int):
        made = iter([[Answer([i], None, 0, False)] * n for i in (*changed_ids, 1)])
        monkeypatch.setattr(chain_of_thought, "_answers", lambda *_, **options: next(made))
        return chain_of_thought.experiment(nano, rows, max_new_tokens=1)["chain_of_thought"]

    n_changes = len(chain_of_thought.FRACTIONS) + 1 + len(chain_of_thought._hidden(nano, "messages"))
    other, same = study(*range(2, 2 + n_changes)), study(*[1] * n_changes)
    assert float(other["same"].max()) == 0
    assert float(other["area"]) == pytest.approx(0.875)
    assert float(same["same"].min()) == 1
    assert 0 == float(same["area_low"]) < float(same["area_high"]) < 0.5, "an interval also where all agree"
    for result in (other, same):
        assert f"{n} answers with the complete analysis do not end within 1 tokens" in result.attrs["summary"]
        assert "nan" not in result.attrs["summary"]
    monkeypatch.setattr(chain_of_thought, "same_answer", lambda a, b: a.text == b.text)
    assert float(study(*range(2, 2 + n_changes))["same"].min()) == 1, "negative control"


def test_named_experts_are_those_used_more(run, nano):
    rows = transcripts(run)[::10]
    experts = named_experts(nano, rows, "arithmetic", 3)
    assert len(set(experts)) == 3
    from workbench.experiments.effects import expert_load

    own = expert_load(nano, [r for r in rows if r.meta["domain"] == "arithmetic"])
    others = expert_load(nano, [r for r in rows if r.meta["domain"] != "arithmetic"])
    assert all(own[cell] > others[cell] for cell in experts)


@pytest.mark.filterwarnings("ignore:only .* prompts")
def test_results_hold_the_command_that_makes_them(run, nano):
    """The command is run and gives the same summary. Negative control: with another number of sequences it does not."""
    result = run_experiment("attention-knockout", nano, run, sequences=12, hide="content")["attention"]
    words = shlex.split(result.attrs["command"])
    assert words[-2:] == ["--option", "hide=content"]
    assert "--dtype" in words, "nano is in float32"
    words = [{"RUN": str(DATA / "demo.zarr"), "MODEL": "nano"}.get(word, word) for word in words[1:]]
    assert result.attrs["summary"].splitlines()[0] in run_command(*words).out
    words[words.index("--sequences") + 1] = "24"
    assert result.attrs["summary"].splitlines()[0] not in run_command(*words).out


def test_what_is_refused(run, nano):
    with pytest.raises(InputError, match=r"study or experiment .* does not exist"):
        run_experiment("nonsense", nano, run)
    with pytest.raises(InputError, match="at least 5 are needed"):
        chain_of_thought.study(nano, [r for r in transcripts(run) if r.effort == "low"][:5])


def test_options_that_name_an_output_never_name_one_in_the_run(run, nano):
    """Every option with a path is known as an input or an output; a new one fails until it is."""
    words = re.compile(r"\b(file|folder|jsonl)\b", re.IGNORECASE)
    paths = {name for record in registry.records() for name, text in record.options.items() if words.search(text)}
    assert paths - {"jacobian", "paraphrases", "sae"} == OUTPUTS
    inside = str(DATA / "demo.zarr" / "inside")
    for name, option in (("jacobian-lens", "save"), ("sentence-importance", "store")):
        with pytest.raises(InputError, match="is inside the input"):
            run_experiment(name, nano, run, **{option: inside})


def test_duplicated_prompts_are_one_sampling_unit(run, monkeypatch):
    number = index_of(run).prompts[0]
    chosen = list(run.sequences.index[:12])
    rows, merged = independent_rows(run, chosen)
    assert merged == 0
    assert [row.prompt_id for row in rows] == [row.prompt_id for row in transcripts(run, chosen)]

    class Merged:
        prompts = (number // 2, 100)

    monkeypatch.setattr("workbench.experiments.registry.index_of", lambda run: Merged)
    paired, merged = independent_rows(run, chosen)
    of_pairs = {}
    for sequence, row in zip(chosen, paired, strict=True):
        of_pairs.setdefault(int(number[sequence]) // 2, set()).add(row.prompt_id)
    assert all(len(ids) == 1 for ids in of_pairs.values())
    assert merged == len({row.prompt_id for row in rows}) - len(of_pairs) > 0
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(rows, paired, strict=True))
