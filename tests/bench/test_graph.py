"""The cost of a graph is measured in a process of its own, whose failure is an error."""

import pytest

from workbench.bench import graph
from workbench.errors import JobError


def test_the_cost_of_a_graph_of_nano(capsys: pytest.CaptureFixture[str]) -> None:
    result = graph.run("nano", tokens=12, rounds=1)
    assert result["tokens"] == 12
    assert result["layers"] == 4
    assert len(result["graph_s"]) == len(result["processor_s"]) == 1
    assert 0 < result["nodes"] <= result["nodes_in_pass"]
    assert result["completeness"] < 1e-3
    assert f"{result['nodes']} of {result['nodes_in_pass']:,} nodes" in capsys.readouterr().out


def test_a_model_that_is_not_there_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(JobError, match="the measuring process ended with 1"):
        graph.run("no-such-model", tokens=12, rounds=1)
    assert "no-such-model" in capfd.readouterr().err
