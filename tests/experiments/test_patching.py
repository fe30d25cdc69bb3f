"""Patching by class of tokens and layer: the effort word carries everything at the embedding, the others nothing."""

from dataclasses import replace

import numpy as np
import pytest

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.experiments import patching
from workbench.experiments.effects import logprobs
from workbench.experiments.final_channel import generated_tokens
from workbench.experiments.from_run import transcripts
from workbench.harmony.transcripts import Transcript
from workbench.model.transformer import GptOss

pytestmark = pytest.mark.filterwarnings("ignore:only .* prompts")


@pytest.fixture(scope="module")
def rows() -> list[Transcript]:
    every = transcripts(wb.open_run(DATA / "demo.zarr"))
    return [row for row in every if row.effort != "medium" and row.prompt_id in [f"reverse-{i:02d}" for i in range(6)]]


def test_classes_divide_the_prompt_after_its_first_difference(nano: GptOss, rows: list[Transcript]) -> None:
    for own, other in patching.effort_pairs(nano, rows):
        word, near, rest = patching.token_classes(own, other)
        text = "".join(nano.tokenizer.token(int(own.tokens[i])) for i in word)
        assert text.strip() == own.effort
        assert near.tolist() == list(range(word[-1] + 1, word[-1] + 1 + patching.NEIGHBOURS))
        assert sorted([*word, *near, *rest]) == list(range(word[0], own.n_prompt))


def test_every_sequence_is_patched_once_for_each_other_effort(nano: GptOss, rows: list[Transcript]) -> None:
    """Negative control: one sequence of each prompt and effort, as before, leaves the second ones out."""
    copies = [replace(row, id=f"{row.id}, again") for row in rows if row.effort == "high"]
    pairs = patching.effort_pairs(nano, [*rows, *copies])
    assert sorted(own.id for own, _ in pairs) == sorted(row.id for row in [*rows, *copies])
    assert len(patching.effort_pairs(nano, rows)) == len(rows) < len(pairs)


def test_a_patched_effort_word_is_the_other_word(
    nano: GptOss, rows: list[Transcript], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the embedding the word's patch is the transcript with the other word; states after all layers do nothing.

    Negative control: patching all positions at once, as before, makes layer 0 carry everything by construction.
    """
    own, other = patching.effort_pairs(nano, rows)[0]
    changes = patching._changes(nano, own, other)
    tokens = own.tokens.copy()
    tokens[: own.n_prompt] = other.tokens[: own.n_prompt]
    swapped = Transcript("b", own.prompt_id, own.effort, tokens, own.n_prompt)
    base, exchanged = logprobs(nano, [own, swapped], generated_tokens(nano))
    assert changes.shape == (3, nano.cfg.n_layers + 1)
    assert changes[0, 0] == pytest.approx(exchanged - base, abs=1e-2)
    np.testing.assert_allclose(changes[1:, 0], 0, atol=1e-3)
    np.testing.assert_allclose(changes[:, -1], 0, atol=1e-3)  # no layer reads what the last one wrote
    later = np.arange(patching.token_classes(own, other)[0][0], own.n_prompt)
    monkeypatch.setattr(patching, "token_classes", lambda *_: [later])
    at_once = patching._changes(nano, own, other)
    np.testing.assert_allclose(at_once[0, :2], exchanged - base, atol=1e-2)


def test_the_datasets_hold_each_class_with_increments(nano: GptOss, rows: list[Transcript]) -> None:
    results = patching.experiment(nano, rows)
    assert list(results) == ["effort_word", "neighbours", "rest"]
    for result in results.values():
        assert result["layer"].values.tolist() == ["embedding", "0", "1", "2", "3"]
        np.testing.assert_allclose(result["increment"].sum("layer"), result["change"].isel(layer=-1), atol=1e-9)
        assert "generated at its own effort" in result.attrs["method"]
    word = results["effort_word"]["change"]
    assert float(np.abs(word.sel(layer="embedding")).min()) > 1
    with pytest.raises(InputError, match="fewer than 5 prompts"):
        patching.experiment(nano, rows[:8])
