"""The command that explains one token of an answer by an attribution graph."""

from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.cli.options import Device, Dtype, Model, Overwrite, load_model
from workbench.errors import InputError

app = typer.Typer()


@app.command()
def graph(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text of the user's message.")],
    out: Annotated[Path, typer.Option(help="JSON file to write, in circuit-tracer's format; .graphml writes GraphML.")],
    effort: Annotated[str, typer.Option(help="Reasoning effort: low, medium or high.")] = "medium",
    target: Annotated[
        str | None, typer.Option(help="Token whose logit is explained. [default: the token of the answer]")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Token whose logit is subtracted. [default: the mean of all logits]")
    ] = None,
    at: Annotated[
        int | None,
        typer.Option(help="Number of the generated token to explain, from 0. [default: the first of the final answer]"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Generate at most so many tokens.")] = 512,
    nodes: Annotated[float, typer.Option(help="Share of the influence that the nodes keep.")] = 0.8,
    edges: Annotated[float, typer.Option(help="Share of the influence that the edges keep.")] = 0.98,
    features: Annotated[
        str | None, typer.Option(help="URL of the pages of experts that `workbench export RUN neuronpedia` wrote.")
    ] = None,
    neurons: Annotated[
        int,
        typer.Option(
            min=0, help="Show each expert as its N largest neurons and the sum of the others. 0: as one node."
        ),
    ] = 0,
    sae: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of an autoencoder whose features become nodes, at the point of the residual stream that it "
            "names; repeat for several."
        ),
    ] = None,
    choices: Annotated[
        bool,
        typer.Option(
            help="Add edges into queries, keys and router logits: what decided the attention and the routing."
        ),
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    overwrite: Overwrite = False,
) -> None:
    """Explain one token of the model's answer by an attribution graph."""
    from workbench import harmony
    from workbench.experiments import graph_details, graph_export
    from workbench.experiments.attribution_graph import graph as make
    from workbench.experiments.dictionary_features import load_autoencoders
    from workbench.outputs import check_output, staged

    check_output(out, command="graph", inputs=[model, *(sae or [])], overwrite=overwrite)
    loaded = load_model(model, device, dtype)
    ids = harmony.render([{"role": "user", "content": prompt}], effort=effort, tokenizer=loaded.tokenizer)
    (answer,) = loaded.generate([ids], max_new_tokens=max_new_tokens)
    place = _place(loaded, ids, answer, at)
    wanted: Any = answer[place] if target is None else target
    options: dict[str, Any] = {"target": wanted, "against": against, "node_share": nodes, "edge_share": edges}
    found = make(loaded, [*ids, *answer[:place]], saes=load_autoencoders(sae or [], loaded.device), **options)
    if neurons:
        found = graph_details.with_neurons(loaded, found, top=neurons)
    chosen = graph_details.choice_edges(loaded, found) if choices else None
    with staged(out, command="graph", inputs=[model, *(sae or [])], overwrite=overwrite) as part:
        if out.suffix == ".graphml":
            import networkx

            networkx.write_graphml(graph_export.to_networkx(found, chosen), part)
        else:
            graph_export.write_json(loaded, found, part, features_url=features, choices=chosen)
    print(f"answer: {loaded.tokenizer.decode(answer)}")
    print(_described(found))
    print(out)


def _place(model: Any, ids: list[int], answer: list[int], at: int | None) -> int:
    """Return the number of the generated token to explain.

    Raises:
        InputError: there is no such token, or the answer has no final channel.
    """
    from workbench import harmony

    if at is not None:
        if not 0 <= at < len(answer):
            raise InputError(f"--at {at}: the model generated {len(answer)} tokens, 0 to {len(answer) - 1}")
        return at
    labels = harmony.label([*ids, *answer], tokenizer=model.tokenizer, n_prompt=len(ids))
    starts = [m.content - len(ids) for m in labels.messages if m.channel == "final" and m.content >= len(ids)]
    if not starts or starts[0] >= len(answer):
        raise InputError("the answer has no final channel: raise --max-new-tokens, or choose a token with --at")
    return starts[0]


def _described(found: Any) -> str:
    from workbench.experiments.graph_export import label

    lines = [repr(found).strip("<>")]
    inner = found.nodes[found.nodes["kind"].isin(("head", "expert"))].nlargest(5, "influence")
    for _, row in inner.iterrows():
        lines.append(f"  {label(row)} at token {row['pos']} ({row['token']!r}): {row['value']:+.2f} logits")
    return "\n".join(lines)
