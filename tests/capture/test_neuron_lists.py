"""The recorded activations of neurons are the largest of the whole run, whatever its units, and damage is found."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

import workbench as wb
from tests.capture.test_feature_lists import write_sae
from tests.conftest import DATA
from workbench.capture import recording
from workbench.errors import InputError
from workbench.experiments import from_run
from workbench.harmony.labels import CHANNELS
from workbench.harmony.transcripts import write_transcripts
from workbench.model.transformer import GptOss
from workbench.runs import neuron_examples
from workbench.runs.examples import sample_keys
from workbench.runs.reader import Run
from workbench.runs.verify import verify

LAYER, EXPERT = 2, 5


@pytest.fixture(scope="module")
def model() -> GptOss:
    return wb.load("nano", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def run(model: GptOss, transcripts: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("neurons") / "run"
    return wb.capture(model, transcripts, path, record=["routing", "neurons:1-2"], unit_tokens=1024)


def activations(model: GptOss, run: Run) -> list[tuple[int, int, int, np.ndarray]]:
    """Channel, sequence, position and activations [neuron] of every token of the expert, from passes of single rows."""
    entries = []
    codes = np.concatenate([block["channel"] for block in run.blocks("id")])
    starts = np.concatenate([[0], run.sequences["length"].cumsum().to_numpy()])
    for s, row in enumerate(from_run.transcripts(run)):
        ids = torch.as_tensor(np.asarray(row.tokens).astype(np.int64))[None]
        names = [f"blocks.{LAYER}.mlp.{name}" for name in ("hook_expert_indices", "experts.hook_post")]
        with torch.no_grad():
            cache = model.run_with_cache(ids, names_filter=names, return_cache_object=False)[1]
        chosen, post = (cache[name][0] for name in names)
        for pos, slot in (chosen == EXPERT).nonzero().tolist():
            entries.append((int(codes[starts[s] + pos]), s, pos, post[pos, slot].numpy()))
    return entries


def test_lists_hold_the_largest_activations_of_the_run(model: GptOss, run: Run) -> None:
    assert run.layout.units[1:], "the claim is about several units"
    lists = neuron_examples.of_expert(run, LAYER, EXPERT)
    every = activations(model, run)
    signed = 0
    for c in range(len(CHANNELS)):
        own = [row for row in every if row[0] == c]
        n = min(len(own), lists["activation"].shape[-1])
        assert ((lists["sequence"][c] >= 0).sum(-1) == n).all()
        if not own:
            continue
        table = np.stack([row[3] for row in own])
        largest = np.sort(np.abs(table), axis=0)[::-1][:n].T
        np.testing.assert_allclose(np.abs(lists["activation"][c, :, :n]), largest, rtol=2e-3, atol=1e-4)
        by_place = {(s, p): values for _, s, p, values in own}
        for neuron in (0, 7, 127):
            for i in range(n):
                place = int(lists["sequence"][c, neuron, i]), int(lists["position"][c, neuron, i])
                assert by_place[place][neuron] == pytest.approx(lists["activation"][c, neuron, i], rel=2e-3, abs=1e-4)
        signed += int((lists["activation"][c] < 0).sum())
        by_sign = np.sort(table, axis=0)[::-1][:n].T  # negative control: the largest by sign are others
        assert not np.allclose(np.abs(by_sign), largest, rtol=2e-3)
    assert signed > 0


def test_the_random_sample_is_that_of_the_smallest_keys_of_the_run(model: GptOss, run: Run) -> None:
    lists = neuron_examples.of_expert(run, LAYER, EXPERT)
    every = activations(model, run)
    unlike = 0
    for c in range(len(CHANNELS)):
        own = [row for row in every if row[0] == c]
        keys = [int(sample_keys(np.array(s), np.array(p), LAYER, EXPERT)) for _, s, p, _ in own]
        order = np.argsort(keys, kind="stable")[: lists["random_sequence"].shape[-1]]
        places = list(zip(lists["random_sequence"][c].tolist(), lists["random_position"][c].tolist(), strict=True))
        assert places[: len(order)] == [own[i][1:3] for i in order]
        assert all(place == (-1, -1) for place in places[len(order) :])
        for i, row in enumerate(order):
            np.testing.assert_allclose(lists["random_activation"][c, :, i], own[row][3], rtol=2e-3, atol=1e-4)
        if len(own) > 50:  # negative control: the tokens of the largest activations are others
            unlike += int((lists["random_sequence"][c] != lists["sequence"][c, 7, : len(places)]).any())
    assert unlike > 0


def test_damaged_lists_are_found(model: GptOss, transcripts: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    wb.capture(model, transcripts, path, record=["routing", "neurons:0"], unit_tokens=1024)
    assert verify(path) == []
    group = zarr.open_group(str(path), mode="r+")
    filled = np.argwhere(group["neurons/sequence"][0] >= 0)[0]
    group["neurons/position"][(0, *filled)] += 1
    sampled = np.argwhere(group["neurons/random_sequence"][0] >= 0)[0]
    group["neurons/random_position"][(0, *sampled)] += 1
    problems = [problem.what for problem in verify(path, recompute=True)]
    for name in ("neurons/position", "neurons/random_position"):
        assert any(name in what for what in problems), problems


def test_excluded_sequences_have_no_examples(run: Run) -> None:
    lists = neuron_examples.of_expert(run, LAYER, EXPERT)
    assert set(np.unique(lists["sequence"])) - {-1} <= set(run.sequences.index)
    with pytest.raises(InputError, match="recorded those of the layers 1, 2"):
        neuron_examples.of_expert(run, 0, EXPERT)
    with pytest.raises(InputError, match="experts 0 to 15"):
        neuron_examples.of_expert(run, LAYER, 16)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (["neurons"], "also record routing"),
        (["routing", "neurons:1", "neurons:2"], "neurons twice"),
        (["routing", "neurons experts=1"], "no option experts="),
        (["routing", "neurons:9"], "layer"),
    ],
)
def test_records_that_cannot_be_made_are_refused(model: GptOss, record: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recording.parse(record, model.cfg)


@pytest.mark.long
def test_examples_cost_little(model: GptOss, tmp_path: Path) -> None:
    """Processor and wall time of captures that alternate, as ratios to one of the routing alone; `pytest -s` prints."""
    rows = from_run.transcripts(wb.open_run(DATA / "demo.zarr"))
    write_transcripts(tmp_path / "rows.jsonl", rows)
    sae = write_sae(tmp_path / "sae", model.cfg.d_model, d_sae=8 * model.cfg.d_model)
    more = {"examples": ["examples"], "neurons": ["neurons"], "features": [f"features:{sae}"]}
    records = {"routing": ["routing"]} | {name: ["routing", *own] for name, own in more.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in records}
    for turn in range(4):
        for name, record in records.items():
            begun = time.process_time(), time.perf_counter()
            wb.capture(model, tmp_path / "rows.jsonl", tmp_path / f"{name}{turn}", record=record)
            seconds[name].append((time.process_time() - begun[0], time.perf_counter() - begun[1]))
        ratios = {n: np.median(np.divide(own, seconds["routing"]), axis=0).round(3) for n, own in seconds.items()}
        shown = {name: f"{processor:g}, wall {wall:g}" for name, (processor, wall) in ratios.items()}
        print(f"{turn + 1} turns, {sum(len(row.tokens) for row in rows):,} tokens, processor time relative to {shown}")
    print({name: [f"{wall:.1f} s" for _, wall in own] for name, own in seconds.items()})
    assert ratios["examples"][0] < 1.15


def test_all_layers_by_default(model: GptOss) -> None:
    assert recording.parse(["routing", "neurons"], model.cfg).neuron_layers == (0, 1, 2, 3)
    spec = recording.parse(["routing", "neurons layers=1-2"], model.cfg)
    assert type(spec).from_json(spec.to_json()) == spec
