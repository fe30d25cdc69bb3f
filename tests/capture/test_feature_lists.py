"""The recorded examples of an autoencoder's features are those of the whole run, in lists that do not grow."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import save_file

import workbench as wb
from workbench.capture import feature_lists, recording
from workbench.capture.feature_lists import BoundedLists, FeatureRecorder
from workbench.errors import InputError, JobError
from workbench.experiments import from_run
from workbench.harmony.labels import CHANNELS
from workbench.hooks.sae import load_sae
from workbench.model.transformer import GptOss
from workbench.runs import feature_examples
from workbench.runs.examples import sample_keys
from workbench.runs.reader import Run
from workbench.runs.schema import N_FEATURE_EXAMPLES, FeatureLists
from workbench.runs.verify import verify

HOOK, LAYER = "blocks.2.hook_resid_post", 2


def write_sae(folder: Path, d_in: int, d_sae: int = 24, hook: str = HOOK) -> Path:
    """Write a folder of SAELens with random weights, of which the thresholds leave few tokens to a feature."""
    rng = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    options = {"architecture": "jumprelu", "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "hook_name": hook}
    (folder / "cfg.json").write_text(json.dumps(options))
    weights = {
        "W_enc": torch.randn(d_in, d_sae, generator=rng) / d_in**0.5,
        "W_dec": torch.randn(d_sae, d_in, generator=rng),
        "b_enc": torch.zeros(d_sae),
        "b_dec": torch.zeros(d_in),
        "threshold": torch.linspace(0.1, 4, d_sae),
    }
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


@pytest.fixture(scope="module")
def model() -> GptOss:
    return wb.load("nano", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def sae_folder(model: GptOss, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sae(tmp_path_factory.mktemp("saes") / "layer2", model.cfg.d_model)


@pytest.fixture(scope="module")
def run(model: GptOss, sae_folder: Path, transcripts: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("features") / "run"
    return wb.capture(model, transcripts, path, record=[f"features:{sae_folder}"], unit_tokens=1024)


def activations(model: GptOss, run: Run, folder: Path) -> tuple[list[tuple[int, int, int]], np.ndarray]:
    """Channel, sequence and position of every token, and its features [token feature], from passes of single rows."""
    sae, places, values = load_sae(folder), [], []
    codes = np.concatenate([block["channel"] for block in run.blocks("id")])
    for s, row in enumerate(from_run.transcripts(run)):
        ids = torch.as_tensor(np.asarray(row.tokens).astype(np.int64))[None]
        with torch.no_grad():
            _, cache = model.run_with_cache(ids, names_filter=[HOOK], return_cache_object=False)
            values.append(sae.encode(cache[HOOK][0]).numpy())
        places += [(int(codes[len(places) + pos]), s, pos) for pos in range(ids.shape[1])]
    return places, np.concatenate(values)


def test_lists_are_those_of_the_run(model: GptOss, run: Run, sae_folder: Path) -> None:
    assert run.layout.units[1:], "the claim is about several units"
    assert "features" in run.recorded
    lists = feature_examples.of_run(run)
    places, values = activations(model, run, sae_folder)
    channel = np.array([place[0] for place in places])
    compared, unlike = 0, 0
    for c in range(len(CHANNELS)):
        for feature in range(values.shape[1]):
            own = np.flatnonzero((channel == c) & (values[:, feature] > 0))
            assert lists["count"][c, feature] == len(own)
            n = min(len(own), N_FEATURE_EXAMPLES)
            largest = np.sort(values[own, feature])[::-1][:n]
            np.testing.assert_allclose(lists["top_activation"][c, feature, :n], largest, rtol=1e-4, atol=1e-5)
            _, sequence, position = np.array([places[i] for i in own] or [(0, 0, 0)]).T
            keys = sample_keys(sequence, position, LAYER, np.array(feature))
            chosen = [places[own[i]][1:] for i in np.argsort(keys, kind="stable")[:n]] if n else []
            shown = [lists[f"random_{name}"][c, feature].tolist() for name in ("sequence", "position")]
            assert list(zip(*shown, strict=True)) == chosen + [(-1, -1)] * (N_FEATURE_EXAMPLES - n)
            by_place = {places[i][1:]: values[i, feature] for i in own}
            for kind in ("top", "random"):
                cell = [
                    lists[f"{kind}_{name}"][c, feature, :n].tolist() for name in ("activation", "sequence", "position")
                ]
                for activation, s, p in zip(*cell, strict=True):
                    assert by_place[s, p] == pytest.approx(activation, rel=1e-4, abs=1e-5)
            compared += n
            # negative control: the first tokens of a feature are not its largest
            unlike += len(own) > 50 and not np.allclose(values[own, feature][:n], largest, rtol=1e-3)
    assert compared > 200
    assert unlike > 10
    some = feature_examples.of_run(run, HOOK, [7, 3])
    assert all(np.array_equal(some[name], lists[name][:, [7, 3]]) for name in feature_examples.names())


def planted(n_tokens: int) -> dict[str, np.ndarray]:
    """A unit of one sequence of analysis."""
    channel = np.full(n_tokens, CHANNELS.index("analysis"), dtype=np.uint8)
    return {
        "sequence": np.zeros(n_tokens, np.int32),
        "position": np.arange(n_tokens, dtype=np.int32),
        "channel": channel,
    }


class _Planted:
    """An autoencoder whose features are the activations themselves."""

    def to(self, device: torch.device) -> "_Planted":
        return self

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        self.most = max(getattr(self, "most", 0), x.numel())
        return x


def recorded(values: torch.Tensor, passes: int) -> tuple[FeatureRecorder, _Planted]:
    """A recorder that saw planted features [token feature] in several passes."""
    sae = _Planted()
    recorder = FeatureRecorder(FeatureLists(HOOK, values.shape[1], ""), sae)  # type: ignore[arg-type]
    recorder.start(planted(len(values)))
    for part in values.tensor_split(passes):
        recorder.begin(len(part))
        recorder._add(part[None], None)
    return recorder, sae


def test_planted_activations_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.zeros(5000, 6)
    rng = np.random.default_rng(0)
    largest = rng.choice(5000, N_FEATURE_EXAMPLES, replace=False)
    values[:, 1] = torch.from_numpy(rng.random(5000).astype(np.float32))
    values[largest, 1] = torch.arange(20, 20 - N_FEATURE_EXAMPLES, -1.0)
    values[[10, 4321], 2] = 0.5  # equal activations: in the order of the tokens
    values[:, 3] = -1  # never above 0
    lists = recorded(values, passes=7)[0].take()
    c = CHANNELS.index("analysis")
    assert lists[f"features/{HOOK}_top_position"][c, 1].tolist() == largest.tolist()
    assert lists[f"features/{HOOK}_top_position"][c, 2].tolist() == [10, 4321, -1, -1, -1, -1, -1, -1]
    assert lists[f"features/{HOOK}_count"][c].tolist() == [0, 5000, 2, 0, 0, 0]
    assert (lists[f"features/{HOOK}_top_sequence"][[0, 1]] == -1).all(), "other channels have no token"
    sample = lists[f"features/{HOOK}_random_position"][c, 1]
    assert len(set(sample.tolist())) == N_FEATURE_EXAMPLES
    assert set(sample.tolist()) != set(largest.tolist())
    # negative control: lists that keep the largest keys have other tokens
    monkeypatch.setattr(
        BoundedLists,
        "add",
        lambda lists, cell, key, row, value: _ADD(lists, cell, np.uint64(2**63) - key // 2, row, value),
    )
    assert recorded(values, passes=7)[0].take()[f"features/{HOOK}_top_position"][c, 1].tolist() != largest.tolist()


_ADD = BoundedLists.add


def test_the_random_sample_is_uniform_over_the_tokens_of_a_feature() -> None:
    values = torch.zeros(400, 300)
    values[::2] = 1  # the tokens with even numbers have every feature
    sample = recorded(values, passes=3)[0].take()[f"features/{HOOK}_random_position"][CHANNELS.index("analysis")]
    assert (sample % 2 == 0).all()
    counts = np.bincount(sample.ravel() // 2, minlength=200)  # 300 features × 8 of 200 tokens: 12 expected for each
    statistic = ((counts - 12) ** 2 / 12).sum()
    assert 130 < statistic < 280, "chi-squared with 199 degrees of freedom"


def test_memory_does_not_grow_with_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_lists, "ENCODED_VALUES", 4096)
    sizes = {}
    for n in (500, 20_000):
        recorder, sae = recorded(torch.rand(n, 64, generator=torch.Generator().manual_seed(0)), passes=4)
        sizes[n] = recorder.nbytes
        assert sae.most <= 4096, "values that are encoded at a time"
    per_cell = 2 * N_FEATURE_EXAMPLES * (8 + 4 + 4) + 4
    assert sizes[500] == sizes[20_000] == len(CHANNELS) * 64 * per_cell
    # negative control: lists that keep every token grow
    monkeypatch.setattr(feature_lists, "N_FEATURE_EXAMPLES", 20_000)
    assert recorded(torch.rand(500, 64), passes=1)[0].nbytes > 1000 * sizes[500]


def test_features_that_are_not_finite_stop_the_job() -> None:
    with pytest.raises(JobError, match="not finite"):
        recorded(torch.tensor([[float("nan"), 1.0]]), passes=1)


def test_damaged_lists_are_found(model: GptOss, sae_folder: Path, transcripts: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    wb.capture(model, transcripts, path, record=["routing", f"features:{sae_folder}"], unit_tokens=1024)
    assert verify(path) == []
    group = zarr.open_group(str(path), mode="r+")
    place = np.argwhere(group[f"features/{HOOK}_random_sequence"][0] >= 0)[0]
    group[f"features/{HOOK}_random_position"][(0, *place)] += 100_000
    group[f"features/{HOOK}_count"][0] = 0
    problems = [problem.what for problem in verify(path, recompute=True)]
    assert any("random_position" in text for text in problems), problems
    assert any("count" in text for text in problems), problems


def test_a_job_resumes_with_the_same_autoencoder_only(
    model: GptOss, sae_folder: Path, transcripts: Path, tmp_path: Path
) -> None:
    first = recording.parse([f"features:{sae_folder}"], model.cfg)
    assert type(first).from_json(first.to_json()) == first
    other = write_sae(tmp_path / "other", model.cfg.d_model, d_sae=23)
    assert recording.parse([f"features:{other}"], model.cfg) != first


@pytest.mark.parametrize(
    ("folder", "hook", "message"),
    [
        ("", HOOK, "name the folder of an autoencoder"),
        ("missing", HOOK, "has no cfg.json"),
        ("sae", "blocks.9.hook_resid_post", "layers 0 to 3"),
        ("sae", "hook_embed", "expected a hook point of single tokens"),
        ("sae", "blocks.1.attn.hook_pattern", "expected a hook point of single tokens"),
        ("sae", "blocks.1.attn.hook_q", "where the model has"),
    ],
)
def test_autoencoders_that_do_not_fit_are_refused(
    model: GptOss, tmp_path: Path, folder: str, hook: str, message: str
) -> None:
    write_sae(tmp_path / "sae", model.cfg.d_model, hook=hook)
    with pytest.raises(InputError, match=message):
        recording.parse([f"features:{tmp_path / folder}" if folder else "features:"], model.cfg)


def test_two_autoencoders_of_one_point_and_other_widths_are_refused(
    model: GptOss, sae_folder: Path, tmp_path: Path
) -> None:
    write_sae(tmp_path / "same", model.cfg.d_model)
    with pytest.raises(InputError, match="two autoencoders read"):
        recording.parse([f"features:{sae_folder}", f"features:{tmp_path / 'same'}"], model.cfg)
    write_sae(tmp_path / "wide", model.cfg.d_model + 1)
    with pytest.raises(InputError, match="reads a width of"):
        recording.parse([f"features:{tmp_path / 'wide'}"], model.cfg)
