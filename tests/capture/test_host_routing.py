"""Capture along a host's routes: planted routes come back exactly, and a capture that ignores them fails.

Also tests `workbench.studies.routing_agreement` and `workbench.studies.routing_agreement_runs`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.capture import compute, job
from workbench.capture.host_routing import HostRoutes
from workbench.dashboards.pages import further_studies
from workbench.dashboards.session import Session
from workbench.dashboards.state import RunRegistry, Selection
from workbench.errors import InputError
from workbench.harmony.hosts.routing import write_experts
from workbench.model.transformer import GptOss
from workbench.registry import find
from workbench.runs import Run
from workbench.runs.verify import verify
from workbench.studies import run_study


@pytest.fixture(scope="module")
def nano() -> GptOss:
    return wb.load("nano", dtype=torch.float32)


@pytest.fixture
def planted(nano: GptOss, tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Transcripts whose host chose experts at random: one row to the last token, one without it."""
    rng = np.random.default_rng(0)
    rows, routes = [], {}
    for i, text in enumerate(("2+2=", "17*4=")):
        ids = wb.harmony.render([{"role": "user", "content": text}], effort="low", tokenizer=nano.tokenizer)
        ids += nano.tokenizer.encode("4")
        rows.append({"id": f"r/{i}", "prompt_id": f"p{i}", "effort": "low", "tokens": ids, "n_prompt": len(ids) - 1})
        shape = (len(ids) - i, nano.cfg.n_layers, nano.cfg.num_experts)
        routes[f"r/{i}"] = rng.random(shape).argsort(-1)[..., : nano.cfg.experts_per_token].astype(np.int16)
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for id, experts in routes.items():
        write_experts(path, id, experts)
    return path, routes


def captured(nano: GptOss, path: Path, out: Path, routing: str = "host") -> Run:
    return job.capture(nano, path, out, record=("routing", "logprobs", "router_logits"), routing=routing)


def follows(run: Run, routes: dict[str, np.ndarray]) -> bool:
    """Whether the run's experts are those that were planted."""
    equal = []
    for id, experts in routes.items():
        stored = np.sort(run.sequence(id)["experts"].values, -1)[:, : len(experts)]
        equal.append((stored == np.sort(experts, -1).transpose(1, 0, 2)).all())
    return all(equal)


def test_planted_routes_are_forced_exactly(
    nano: GptOss, planted: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    path, routes = planted
    forced, free = captured(nano, path, tmp_path / "host.zarr"), captured(nano, path, tmp_path / "own.zarr", "own")
    assert follows(forced, routes)
    assert not follows(free, routes)
    rows = forced.sequence("r/1")
    assert rows["forced"].values.tolist() == [True] * (rows.sizes["token"] - 1) + [False]
    # The first layer's router reads the same in both runs: its own choice is that of the free run.
    own, first = (
        np.sort(run.dataset[name].values[0], -1) for run, name in ((forced, "own_experts"), (free, "experts"))
    )
    assert (own == first).all()
    gates = forced.dataset["gates"].values.astype(np.float32)
    assert np.allclose(gates.sum(-1), 1, atol=2e-3)
    assert (forced.dataset["router_margin"].values >= 0).all()
    assert verify(forced.path) == []


def test_a_capture_that_ignores_the_routes_fails(
    nano: GptOss, planted: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, routes = planted

    class Ignores(HostRoutes):
        def _force(self, layer: int):  # type: ignore[no-untyped-def]
            force = super()._force(layer)
            return lambda logits, hook: [logits, force(logits, hook)][0]

    monkeypatch.setattr(compute, "HostRoutes", Ignores)
    assert not follows(captured(nano, path, tmp_path / "broken.zarr"), routes)


def test_the_studies_see_planted_disagreement(
    nano: GptOss, planted: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    path, routes = planted
    free = captured(nano, path, tmp_path / "own.zarr", "own")
    for id in routes:  # a host that agrees everywhere but in the last layer
        experts = free.sequence(id)["experts"].values.transpose(1, 0, 2).astype(np.int16)
        experts[:, -1] = (experts[:, -1] + 1) % nano.cfg.num_experts
        write_experts(path, id, experts)
    run = captured(nano, path, tmp_path / "host.zarr")
    result = run_study("routing-agreement", run)["agreement"]
    tokens = result["tokens"].values > 0
    assert (result["agreement"].values[tokens][:, :-1] == 1).all()
    assert (result["agreement"].values[tokens][:, -1] < 1).all()
    assert result["first_disagreement"].values[:-1].sum() == 0
    assert result["agreement_effort"].sel(effort="low") < 1
    for label, drawing in find("routing-agreement").load_figures().gallery({"agreement": result}).items():
        assert drawing.draw().data, label
    registry = RunRegistry([run.path, free.path], cache=tmp_path / "cache")
    shown = {
        (name, page): len(further_studies(Session(registry, Selection({"run": name}), lambda: None), page))
        for name, page in (("host", "experts"), ("own", "experts"), ("own", "compare"))
    }
    assert shown["host", "experts"] == shown["own", "experts"] + 2, "a heading and a result"
    assert shown["own", "compare"] >= 2
    registry.jobs.close()
    both = run_study("routing-agreement-runs", run, free)["agreement"]
    assert (both["agreement"].values[tokens][:, :-1] == 1).all()
    assert float(both["logprob_effect"]) > 0
    same = run_study("routing-agreement-runs", free, free)["agreement"]
    assert (same["agreement"].values[tokens] == 1).all()
    assert float(same["logprob_effect"]) == 0


def test_what_cannot_be_followed_is_refused(
    nano: GptOss, planted: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    path, routes = planted
    write_experts(path, "r/0", routes["r/0"][:5])
    with pytest.raises(InputError, match="are of 5 tokens"):
        captured(nano, path, tmp_path / "x.zarr")
    write_experts(path, "r/0", np.concatenate([routes["r/0"]] * 2, 1))
    with pytest.raises(InputError, match="is it the model that the host ran"):
        captured(nano, path, tmp_path / "x.zarr")
    (tmp_path / "other.jsonl").write_text(path.read_text())
    with pytest.raises(InputError, match="collect the transcripts with"):
        captured(nano, tmp_path / "other.jsonl", tmp_path / "x.zarr")
    with pytest.raises(InputError, match="also record routing"):
        job.capture(nano, path, tmp_path / "x.zarr", record=("logprobs",), routing="host")
    assert not (tmp_path / "x.zarr").exists()
