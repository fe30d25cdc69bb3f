"""Nodes of a stored graph are ablated in the model: the measured effects are those of hooks that a user would write."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import workbench as wb
from workbench.cli import app
from workbench.errors import InputError
from workbench.experiments import graph_ablation, graph_details, graph_export
from workbench.experiments.attribution_graph import AttributionGraph, graph
from workbench.model.transformer import GptOss


@pytest.fixture(scope="module")
def model() -> GptOss:
    return wb.load("nano", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def attributed(model: GptOss) -> AttributionGraph:
    return graph(model, "12+34=", against="7")


@pytest.fixture(scope="module")
def content(model: GptOss, attributed: AttributionGraph) -> dict[str, Any]:
    return json.loads(json.dumps(graph_export.to_json(model, attributed)))  # type: ignore[no-any-return]


def test_the_file_has_the_nodes_of_the_graph(
    model: GptOss, attributed: AttributionGraph, content: dict[str, Any]
) -> None:
    read = graph_ablation.read_graph(model, content)
    columns = ["kind", "layer", "index", "expert", "neuron", "pos", "value"]
    written = attributed.nodes[attributed.nodes["kind"] != "target"][columns]
    assert {"head", "expert", "embedding"} <= set(read.nodes["kind"])
    assert read.nodes[columns].to_dict("records") == written.to_dict("records")
    assert read.tokens == attributed.tokens
    divided = graph_details.with_neurons(model, attributed, top=2)
    neurons = graph_ablation.read_graph(model, graph_export.to_json(model, divided)).nodes
    assert neurons[columns].to_dict("records") == divided.nodes.iloc[:-1][columns].to_dict("records")


def test_a_head_is_knocked_out_as_by_a_hook_on_z(
    model: GptOss, attributed: AttributionGraph, content: dict[str, Any]
) -> None:
    """The oracle is a pass of its own in which the head's z is zero at the token, as users of TransformerLens do it."""
    heads = attributed.nodes[attributed.nodes["kind"] == "head"].nlargest(2, "influence")
    ids = [graph_export.node_id(model, attributed, row) for _, row in heads.iterrows()]
    effects = graph_ablation.measure(model, content, ids)
    against = attributed.metadata["against_id"]

    def without(*rows: dict[str, Any]) -> float:
        hooks = []
        for row in rows:

            def remove(z: torch.Tensor, hook: object, row: dict[str, Any] = row) -> torch.Tensor:
                z = z.clone()
                z[0, row["pos"], row["index"]] = 0
                return z

            hooks.append((f"blocks.{row['layer']}.attn.hook_z", remove))
        with torch.no_grad():
            last = model.run_with_hooks(torch.tensor([attributed.tokens]), fwd_hooks=hooks)[0, -1].double()
        return float(last[attributed.metadata["target_id"]] - last[against])

    rows = heads.to_dict("records")
    wanted = [without() - without(row) for row in rows]  # type: ignore[arg-type]
    assert effects.nodes["id"].tolist() == ids
    assert effects.nodes["measured"].tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert effects.nodes["value"].tolist() == pytest.approx(heads["value"].tolist())
    assert effects.together == pytest.approx(without() - without(*rows), rel=1e-4, abs=1e-5)  # type: ignore[arg-type]
    other = rows[0] | {"index": (rows[0]["index"] + 1) % model.cfg.n_heads}
    assert without() - without(other) != pytest.approx(wanted[0], rel=1e-2), "negative control: another head"  # type: ignore[arg-type]
    changed = graph_ablation.with_effects(content, effects)["metadata"]["info"]
    assert changed["measured"] == dict(zip(ids, effects.nodes["measured"], strict=True))
    assert changed["measured_together"] == {"nodes": ids, "value": effects.together}
    assert "measured" not in content["metadata"]["info"], "the given content is not changed"


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("metadata", "info", "tokens"), None, "older versions"),
        (("metadata", "info", "checkpoint_digest"), "other", "another checkpoint"),
        (("metadata", "info", "logit"), 99.0, "states a logit of 99.00"),
        (("metadata", "info", "tokens", 0), 10**9, "token ids"),
        (("metadata", "info", "tokens", 0), "a", "token ids"),
        (("metadata", "info", "target_id"), None, "token ids"),
        (("metadata", "info"), None, "no attribution graph"),
        (("nodes", 0, "node_id"), "77_1_0", "layer or token"),
        (("nodes", 0, "node_id"), "x", "no attribution graph"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    model: GptOss, content: dict[str, Any], where: tuple[Any, ...], value: Any, message: str
) -> None:
    assert len(graph_ablation.measure(model, content, top=1).nodes) == 1, "negative control: the unchanged file"
    changed = copy.deepcopy(content)
    inner: Any = changed
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(InputError, match=message):
        graph_ablation.measure(model, changed, top=1)


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.md"
    path.write_text("# Notes")
    with pytest.raises(InputError, match=r"notes\.md: not JSON: .*; expected a file of `workbench graph`"):
        graph_ablation.read_file(path)
    path.write_text("[1]")
    assert graph_ablation.read_file(path) == [1]  # negative control: JSON is read


def test_the_command_prints_and_stores_both_effects(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "g.json").write_text(json.dumps(content))
    arguments = ["graph-ablation", str(tmp_path / "g.json"), "--model", "nano", "--out", str(tmp_path / "m.json")]
    done = CliRunner().invoke(app, [*arguments, "--top", "2"])
    assert done.exit_code == 0, done.output
    assert done.output.count("predicted ") == 2
    assert "all 2 together: measured " in done.output
    info = json.loads((tmp_path / "m.json").read_text())["metadata"]["info"]
    assert list(info["measured"]) == info["measured_together"]["nodes"]
    missing = CliRunner().invoke(app, [*arguments, "--overwrite", "--node", "0_1_999"])
    assert "is not in the graph" in str(missing.exception)
