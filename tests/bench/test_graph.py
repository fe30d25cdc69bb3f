"""The cost of a graph is measured in a process of its own, whose failure is an error."""

import pytest

from workbench.bench import graph
from workbench.errors import JobError


def test_the_cost_of_a_graph_of_nano(capsys: pytest.CaptureFixture[str]) -> None:
    found = graph.run("nano", tokens=12, rounds=1)
    assert found["tokens"] == 12
    assert found["layers"] == 4
    assert len(found["graph_s"]) == len(found["processor_s"]) == 1
    assert 0 < found["nodes"] <= found["nodes_in_pass"]
    assert found["completeness"] < 1e-3
    assert f"{found['nodes']} of {found['nodes_in_pass']:,} nodes" in capsys.readouterr().out


def test_a_model_that_is_not_there_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(JobError, match="the measuring process ended with 1"):
        graph.run("no-such-model", tokens=12, rounds=1)
    assert "no-such-model" in capfd.readouterr().err
