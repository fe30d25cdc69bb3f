"""Label probes: a planted label is read from its layer on, words are not an activation, and nulls are calibrated.

Also tests `workbench.studies.token_labels`.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from workbench.errors import InputError
from workbench.figures import default
from workbench.harmony.labels import CHANNELS
from workbench.studies.label_probes import study
from workbench.studies.probe_folds import ridge
from workbench.studies.result import save

D, PLANTED = 12, 2  # width, and the layer from which the label can be read


class Run:
    """A run of three layers: from PLANTED on, a direction holds the label of each sequence; ids are unrelated."""

    path, digest, model = "run.zarr", "planted", {"n_layers": 3}

    def __init__(self, seed: int, n_prompts: int = 24, size: float = 2.0, words: bool = False) -> None:
        rng = np.random.default_rng(seed)
        length = 10
        self.sequences = pd.DataFrame(
            {
                "id": [f"s{i}" for i in range(n_prompts)],
                "prompt_id": [f"p{i}" for i in range(n_prompts)],
                "task": ["sort" if i % 2 else "sum" for i in range(n_prompts)],
                "effort": "low",
                "domain": "d",
                "correct": 1,
            }
        )
        sequence = np.repeat(np.arange(n_prompts), length)
        own = sequence % 2
        noise = rng.normal(size=(n_prompts, 3, D))[sequence].transpose(1, 0, 2)  # shared by a prompt's tokens
        x = rng.normal(size=(3, len(sequence), D)) + 0.5 * noise
        x[PLANTED:, :, 0] += size * (2 * own - 1)
        ids = rng.integers(0, 8, len(sequence))
        if words:
            ids = 2 * (ids // 2) + np.where(rng.random(len(ids)) < 0.95, own, 1 - own)
        zeros = np.zeros(len(sequence), np.int64)
        self._block = {
            "sequence": sequence,
            "position": np.tile(np.arange(length), n_prompts),
            "channel": zeros,
            "role": zeros,
            "part": zeros,
            "id": ids,
        }
        self._x = x.astype(np.float32)
        about = SimpleNamespace(name="hook_resid_post", layers=(0, 1, 2), per_token=True)
        self.spec = SimpleNamespace(selected=[about])

    def blocks(self, *names: str, layer: int = 0) -> Iterator[dict[str, Any]]:
        yield {**self._block, "hook_resid_post": self._x[layer][None]}


def probes(run: Run, **options: Any) -> Any:
    return study(run, **options)["probes"]  # type: ignore[arg-type]


def test_a_label_is_read_from_its_layer_on_and_thresholds_hold(tmp_path: Any) -> None:
    result = probes(Run(0))
    shown = (result["q"] <= 0.05) & (result["beyond_words_low"] > 0)
    assert shown.values.tolist() == [False, False, True]
    assert float(result["auc"].sel(layer=PLANTED, source="activation")) > 0.95
    assert float(result["auc"].sel(layer=PLANTED, source="control task")) < 0.7
    assert float(result["hits"].sel(layer=PLANTED).mean()) > 0.7
    assert float(result["false_alarms"].sel(layer=PLANTED).mean()) < 0.15
    assert "beyond the best baseline" in result.attrs["summary"]
    drawn = default.gallery({"probes": result})
    assert all(item.draw().data for item in drawn.values())
    assert save({"probes": result}, tmp_path)


def test_a_label_that_the_words_tell_is_not_beyond_them() -> None:
    result = probes(Run(1, size=1.2, words=True))
    assert float(result["auc"].sel(source="token")[0]) > 0.9
    assert not bool(((result["q"] <= 0.05) & (result["beyond_words_low"] > 0)).any())
    naive = result["auc_low"].sel(layer=PLANTED, source="activation")
    assert float(naive) > 0.5, "the negative control: beside chance alone, the words would look like an activation"


def test_nothing_is_beyond_the_baseline_without_a_label_in_activations() -> None:
    false = [bool((probes(Run(seed, size=0.0))["q"] <= 0.05).any()) for seed in range(2, 14)]
    assert sum(false) <= 3


class Copies(Run):
    """Ten texts, each of which four sequences have under ids of their own; activations depend on the text alone.

    alike: whether the tokens of copies are equal. Otherwise they count as different prompts.
    """

    def __init__(self, seed: int, *, alike: bool) -> None:
        super().__init__(seed, n_prompts=40, size=0.0)
        rng = np.random.default_rng(seed)
        sequence = self._block["sequence"]
        text = sequence // 4
        self.labels = rng.permutation(["a", "b"] * 5)[np.arange(40) // 4].tolist()
        self._x = (self._x + 4 * rng.normal(size=(3, 10, D))[:, text]).astype(np.float32)
        self._block["channel"] = np.full(len(sequence), CHANNELS.index("prompt"))
        self._block["id"] = (text if alike else sequence) * 10 + self._block["position"]


def test_copies_of_a_prompt_under_other_ids_are_in_one_fold() -> None:
    """The label of ten texts is random. Negative control: copies that count as prompts tell each other's label."""
    runs = [Copies(seed, alike=True) for seed in range(4)]
    results = [probes(run, label=run.labels) for run in runs]
    assert all("of 10 prompts" in result.attrs["rests_on"] for result in results)
    auc = [float(result["auc"].sel(source="activation").mean()) for result in results]
    assert np.mean(auc) < 0.7
    shown = [bool(((r["q"] <= 0.05) & (r["beyond_words_low"] > 0)).any()) for r in results]
    assert sum(shown) <= 1
    control = Copies(0, alike=False)
    leaking = probes(control, label=control.labels)
    assert "of 40 prompts" in leaking.attrs["rests_on"]
    assert float(leaking["auc"].sel(source="activation").mean()) > 0.95, "negative control"


def test_sequences_are_pooled_and_labels_can_be_given() -> None:
    run = Run(3)
    last = probes(run, pool="last", label=["a" if i % 2 else "b" for i in range(24)])
    assert "24 sequences of 24 prompts" in last.attrs["rests_on"]
    mean = probes(run, pool="mean")
    assert float(mean["auc"].sel(layer=PLANTED, source="activation")) > 0.95


def test_labels_of_few_prompts_are_left_out_and_stated() -> None:
    """Negative control: five prompts are enough for a label, and its AUC is known."""
    labels = ["rare"] * 4 + ["few"] * 5 + ["a" if i % 2 else "b" for i in range(15)]
    result = probes(Run(3), label=labels)
    assert result["label"].values.tolist() == ["a", "b", "few"]
    assert "Skipped, as fewer than 5 prompts have them: rare (4)." in result.attrs["summary"]
    assert "200 tokens of 20 prompts" in result.attrs["rests_on"]
    assert np.isfinite(result["auc"]).all()
    assert "nan" not in result.attrs["summary"]
    assert "Skipped" not in probes(Run(3)).attrs["summary"], "negative control"


def test_ridge_is_the_same_in_both_forms() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 29)), rng.random((30, 2)) < 0.5
    wide = np.concatenate([x, np.zeros((30, 5))], 1)
    np.testing.assert_allclose(ridge(x, y)(x), ridge(wide, y)(wide), atol=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "max"}, "pool='max': use token, mean or last"),
        ({"label": "effort"}, "the tokens have 1 label"),
        ({"label": "mood"}, "'mood' is not a label"),
        ({"hook": "hook_mlp_out"}, "'hook_mlp_out' is not in run.zarr"),
        ({"false_positives": 2.0}, "false_positives=2.0"),
        (
            {"label": ["a"] * 4 + ["b"] * 20},
            r"two labels that at least 5 prompts have, got prompts of a \(4\), b \(20\)",
        ),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        probes(Run(0), **options)
