"""The index of a run counts every token once, merges prompts with equal tokens, and reports progress on large runs."""

import numpy as np
import pandas as pd
import pytest

from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS
from workbench.studies import run_index
from workbench.studies.contrast import contrast
from workbench.studies.run_index import index_of, merge_duplicates, merged_prompts, token_blocks
from workbench.studies.synthetic import SyntheticTokens, planted_tokens


@pytest.mark.parametrize("kind", ["position", "token"])
def test_every_token_is_in_one_cell(kind: run_index.Control) -> None:
    run = planted_tokens(n_prompts=6)
    cells = index_of(run).cells(kind)
    assert cells.tokens.sum() == len(run.tokens["position"])
    for code in range(len(CHANNELS)):
        assert cells.tokens[cells.channel == code].sum() == (run.tokens["channel"] == code).sum()
    assert len(np.unique(cells.code)) == len(cells.code)


def test_strata_of_position_are_narrow() -> None:
    for number in range(30):
        positions = np.flatnonzero(run_index._STRATUM[:5000] == number)
        assert len(positions) <= max(run_index.SLACK, run_index.WIDEST * positions[0] - positions[0])


def test_prompts_with_equal_tokens_are_one_unit_and_counted() -> None:
    run = planted_tokens(n_prompts=8)
    ids = 100 * run.tokens["sequence"] + run.tokens["position"]
    copied = run.tokens["sequence"] >= 12  # the second half of the prompts repeats the first
    prompt = run.tokens["channel"] == 1
    ids = np.where(copied & prompt, 0, np.where(prompt, 1, ids))
    repeated = SyntheticTokens("repeated", run.sequences, run.model, {**run.tokens, "id": ids}, run.truth)
    number, merged = index_of(repeated).prompts
    assert merged == 8 - len(np.unique(number)) >= 4
    with pytest.raises(InputError, match="at least 5"):
        contrast(repeated, "sink", "channel", "analysis", "final")
    assert index_of(run).prompts[1] == 0, "the negative control has other tokens in every prompt"


def conversations(prompts: list[tuple[str, str, list[tuple[int, int]]]]) -> SyntheticTokens:
    """A run whose prompts are a system message with an effort word, and (role, id) tokens: (prompt id, effort, …)."""
    words = {"low": 90, "high": 91}
    rows, parts = [], []
    for number, (prompt, effort, answer) in enumerate(prompts):
        tokens = [(0, 80), (0, words[effort]), *answer, (3, 7), (3, 8)]
        channel = [1] * (2 + len(answer)) + [2, 4]
        parts.append((np.full(len(tokens), number), np.arange(len(tokens)), np.array(channel), *np.array(tokens).T))
        rows.append(
            {"id": f"{number}", "prompt_id": prompt, "effort": effort, "task": "t", "n_prompt": 2 + len(answer)}
        )
    names = ("sequence", "position", "channel", "role", "id")
    joined = {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(names)}
    return SyntheticTokens("conversations", pd.DataFrame(rows).rename_axis("sequence"), {}, joined, {})


def test_a_question_under_another_id_at_another_effort_is_the_same_prompt() -> None:
    questions = [[(2, 10 + i), (2, 20 + i)] for i in range(4)]
    run = conversations([(f"{effort}{i}", effort, q) for effort in ("low", "high") for i, q in enumerate(questions)])
    number, merged = index_of(run).prompts
    assert (number.tolist(), merged) == ([0, 1, 2, 3] * 2, 4)
    without_roles = {name: values for name, values in run.tokens.items() if name != "role"}
    plain = SyntheticTokens("plain", run.sequences, {}, without_roles, {})
    assert index_of(plain).prompts[1] == 0, "negative control: with the effort word, no two prompts are equal"


def test_the_same_words_of_other_roles_are_another_prompt() -> None:
    """A conflict of developer and user has the words of one of two users. Negative control: ids without roles."""
    run = conversations([("a", "low", [(1, 10), (2, 11)]), ("b", "low", [(2, 10), (2, 11)])])
    assert index_of(run).prompts[1] == 0
    without_roles = {name: values for name, values in run.tokens.items() if name != "role"}
    plain = SyntheticTokens("plain", run.sequences, {}, without_roles, {})
    assert index_of(plain).prompts[1] == 1


def test_ids_that_have_several_prompts_are_counted() -> None:
    same, other = [(2, 10), (2, 11)], [(2, 10), (2, 12)]
    mixed = conversations([("a", "low", same), ("a", "high", other), ("b", "low", same[:1]), ("b", "high", same[:1])])
    assert index_of(mixed).ambiguous_ids == 1
    assert "of 1 prompt id have" in run_index.ambiguous_warning(1)
    right = conversations([("a", "low", same), ("a", "high", same), ("b", "low", other), ("b", "high", other)])
    assert index_of(right).ambiguous_ids == 0, "negative control: the effort word alone differs"
    assert run_index.ambiguous_warning(0) == ""


def test_prompts_are_merged_through_a_third() -> None:
    assert merge_duplicates(np.array([0, 1, 2]), {0: b"a", 1: b"b", 2: b"a"})[0].tolist() == [0, 1, 0]
    assert merge_duplicates(np.array([0, 1]), {0: b"", 1: b""})[1] == 0
    # prompts 0 and 2 share no text, but each shares one with prompt 1
    number, merged = merge_duplicates(np.array([0, 1, 1, 2]), {0: b"a", 1: b"a", 2: b"b", 3: b"b"})
    assert (number.tolist(), merged) == ([0, 0, 0, 0], 2)


def test_sums_without_their_run_are_not_merged() -> None:
    run = planted_tokens(n_prompts=4)
    tokens = run.sequences.set_index("id").to_xarray()["prompt_id"].rename(id="sequence")
    tokens = tokens.assign_coords(id=("sequence", tokens["sequence"].values), prompt_id=("sequence", tokens.values))
    number, merged = merged_prompts(object(), tokens)
    assert (len(number), merged) == (len(run.sequences), 0)


def test_a_large_run_reports_progress_and_a_small_one_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = planted_tokens(n_prompts=5)
    run.sequences["length"] = np.bincount(run.tokens["sequence"])
    list(token_blocks(run, "count tokens", "sink"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(run_index, "_LARGE", 1)
    blocks = list(token_blocks(run, "count tokens", "sink"))
    total = int(run.sequences["length"].sum())
    assert sum(len(block["sequence"]) for block in blocks) == total
    assert f"count tokens: {total}" in capsys.readouterr().err.replace(",", "")
