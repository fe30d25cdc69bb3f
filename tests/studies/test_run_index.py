"""The index of a run counts every token once, merges prompts with equal tokens, and reports progress on large runs."""

import numpy as np
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
