"""Probes along the analysis: a planted label is read from its point and layer on, and nulls are calibrated."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from workbench.errors import InputError
from workbench.figures import probe_trajectory as figures
from workbench.harmony.labels import CHANNELS
from workbench.studies.probe_trajectory import study
from workbench.studies.result import save

D, LAYER, FROM = 10, 1, 0.6  # width; the label can be read from this layer and share of the analysis on


class Run:
    """Sequences of 5 prompt tokens and 10 of analysis; from FROM on, layer LAYER holds whether the answer is right."""

    path, digest, model = "run.zarr", "planted", {"n_layers": 2}

    def __init__(self, seed: int, n: int = 80, size: float = 3.0, words: bool = False) -> None:
        rng = np.random.default_rng(seed)
        right = rng.permutation(np.arange(n) % 2)
        names = {"id": [f"s{i}" for i in range(n)], "prompt_id": [f"p{i}" for i in range(n)]}
        self.sequences = pd.DataFrame({**names, "task": "t", "effort": "low", "domain": "d", "correct": right})
        sequence, position = np.repeat(np.arange(n), 15), np.tile(np.arange(15), n)
        own, late = right[sequence], (position - 5 + 1) / 10 >= FROM - 1e-9
        x = rng.normal(size=(2, len(sequence), D))
        x[LAYER, :, 0] += size * (2 * own - 1) * late
        ids = rng.integers(0, 6, len(sequence))
        ids = np.where(late & words, 10 + own, ids)
        ids = np.where(position == 0, 100 + sequence, ids)
        self._x = x.astype(np.float32)
        channel = np.where(position >= 5, CHANNELS.index("analysis"), CHANNELS.index("prompt"))
        zeros = np.zeros(len(sequence), np.int64)
        self._block = {"sequence": sequence, "position": position, "channel": channel, "role": zeros, "part": zeros}
        self._block["id"] = ids
        about = SimpleNamespace(name="hook_resid_post", layers=(0, 1), per_token=True)
        self.spec = SimpleNamespace(selected=[about])

    def blocks(self, *names: str, layer: int = 0) -> Iterator[dict[str, Any]]:
        yield {**self._block, "hook_resid_post": self._x[layer][None]}


def trajectory(run: Run, **options: Any) -> Any:
    return study(run, **options)["trajectory"]  # type: ignore[arg-type]


def test_the_label_is_read_from_its_point_and_layer_on(tmp_path: Any) -> None:
    result = trajectory(Run(0))
    assert result["share"].values.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert np.isnan(float(result["onset"].sel(layer=0)))
    assert float(result["onset"].sel(layer=LAYER)) == pytest.approx(FROM)
    late = result.sel(layer=LAYER).isel(share=slice(3, None))
    assert (late["auc"] > 0.95).all()
    assert (late["gain_low"] > 0).all()
    assert (result["baseline"] < 0.75).all()
    assert (result["control"] < 0.75).all()
    assert "beyond the best baseline from 60% on" in result.attrs["summary"]
    drawn = figures.gallery({"trajectory": result})["trajectory"]
    assert len(drawn.draw().data) == 3
    assert len(drawn.table()) == 12
    assert save({"trajectory": result}, tmp_path)


def test_what_the_tokens_tell_is_no_finding() -> None:
    result = trajectory(Run(1, words=True))
    assert float(result["baseline"].sel(source="tokens so far")[-1]) > 0.95
    assert np.isnan(result["onset"].values).all()
    chance = result["auc_low"].sel(layer=LAYER).values[3:]
    assert (chance > 0.5).all(), "the negative control: beside chance alone, an onset would be shown"


def test_nothing_is_shown_without_a_label_in_activations() -> None:
    false = [np.isfinite(trajectory(Run(seed, size=0.0), points=2)["onset"].values).any() for seed in range(2, 8)]
    assert sum(false) <= 1


@pytest.mark.parametrize("alike", [True, False])
def test_copies_of_a_prompt_under_other_ids_are_in_one_fold(alike: bool) -> None:
    """Twenty texts with four sequences each, whose activations depend on the text and whose label is random by text.

    Negative control: copies with other tokens, which count as prompts and tell each other's label.
    """
    run, rng = Run(4, size=0.0), np.random.default_rng(4)
    sequence = run._block["sequence"]
    prompt = run._block["channel"] == CHANNELS.index("prompt")
    if alike:
        run._block["id"] = np.where(prompt, sequence // 4 * 5 + run._block["position"], run._block["id"])
    run._x = (run._x + 4 * rng.normal(size=(2, 20, D))[:, sequence // 4]).astype(np.float32)
    labels = rng.permutation(["a", "b"] * 10)[np.arange(80) // 4].tolist()
    result = trajectory(run, label=labels, points=2)
    assert f"of {20 if alike else 80} prompts" in result.attrs["rests_on"]
    auc = float(result["auc"].mean())
    assert auc < 0.7 if alike else auc > 0.9
    assert np.isfinite(result["onset"].values).any() == (not alike)


def test_labels_can_be_given_and_some_left_out() -> None:
    run = Run(3)
    labels = ["" if i < 10 else "right" if right else "wrong" for i, right in enumerate(run.sequences["correct"])]
    result = trajectory(run, label=labels, points=2)
    of_one_prompt = Run(3)  # ten sequences, with which no fold could be fitted and scored
    of_one_prompt.sequences.loc[:9, "prompt_id"] = "one"
    rare = trajectory(of_one_prompt, label=[label or "rare" for label in labels], points=2)
    assert "Skipped, as fewer than 5 prompts have them: rare (1)." in rare.attrs["summary"]
    assert rare.attrs["rests_on"] == result.attrs["rests_on"]
    assert result.attrs["rests_on"] == "70 sequences of 70 prompts, 2 labels"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "role"}, "label='role' is one of tokens"),
        ({"channel": "prompt"}, "channel='prompt', points=5"),
        ({"points": 11}, "0 sequences with at least 11 tokens in analysis"),
        ({"label": "task"}, "have 1 labels and 80 prompts"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trajectory(Run(0), **options)
