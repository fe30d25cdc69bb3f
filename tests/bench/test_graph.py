"""The cost of a graph is measured in a process of its own, whose failure is an error."""

from collections import Counter
from typing import Any

import pytest
import torch

import workbench as wb
from workbench.bench import graph
from workbench.errors import JobError
from workbench.experiments import graph_checks
from workbench.experiments.frozen_pass import BackwardFlow, FrozenPass
from workbench.model.transformer import GptOss


def test_the_cost_of_a_graph_of_nano(capsys: pytest.CaptureFixture[str]) -> None:
    result = graph.run("nano", tokens=12, rounds=1)
    assert result["tokens"] == 12
    assert result["layers"] == 4
    assert len(result["graph_s"]) == len(result["processor_s"]) == 1
    assert 0 < result["nodes"] <= result["nodes_in_pass"]
    assert result["completeness"] < 1e-3
    assert f"{result['nodes']} of {result['nodes_in_pass']:,} nodes" in capsys.readouterr().out


def test_a_graph_takes_one_pass_forwards_and_one_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many nodes it has: what its time depends on, on a machine of any speed."""
    model = wb.load("nano", dtype=torch.float32, device="cpu")
    passes: Counter[str] = Counter()
    forward, backward = GptOss.forward, FrozenPass.backward

    def counted_forward(self: GptOss, *args: Any, **options: Any) -> Any:
        passes["forward"] += 1
        return forward(self, *args, **options)

    def counted_backward(self: FrozenPass, end: torch.Tensor) -> BackwardFlow:
        passes["backward"] += 1
        return backward(self, end)

    monkeypatch.setattr(GptOss, "forward", counted_forward)
    monkeypatch.setattr(FrozenPass, "backward", counted_backward)
    for most in (20, 400):
        passes.clear()
        made = wb.experiments.graph(model, "12+34=", max_nodes=most)
        assert passes == {"forward": 1, "backward": 1}
        assert made.metadata["considered_nodes"] < most
    graph_checks.ablate(model, made, made.nodes.index[made.nodes["kind"] == "expert"][:2])
    assert passes["forward"] == 1 + 1 + 2, "the negative control: a pass for each ablated node, and one without"


def test_a_model_that_is_not_there_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(JobError, match="the measuring process ended with 1"):
        graph.run("no-such-model", tokens=12, rounds=1)
    assert "no-such-model" in capfd.readouterr().err
