"""Commands that look inside one sequence: the attribution graph of a token, and attention patterns."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.cli.damage import names_damage
from workbench.cli.options import Adapter, Device, Dtype, IgnoreField, Model, Overwrite, RunPath, load_model
from workbench.counting import count_of, signed
from workbench.errors import InputError

app = typer.Typer()


@app.command()
def graph(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text of the user's message.")],
    out: Annotated[Path, typer.Option(help="JSON file to write, in circuit-tracer's format; .graphml writes GraphML.")],
    effort: Annotated[str, typer.Option(help="Reasoning effort: low, medium or high.")] = "medium",
    target: Annotated[
        str | None, typer.Option(help="Token whose logit is explained. (default: the token of the answer)")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Token whose logit is subtracted. (default: the mean of all logits)")
    ] = None,
    at: Annotated[
        int | None,
        typer.Option(help="Number of the generated token to explain, from 0. (default: the first of the final answer)"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Generate at most this many tokens.")] = 512,
    nodes: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the influence that the nodes keep.")] = 0.8,
    edges: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the influence that the edges keep.")] = 0.98,
    features: Annotated[
        str | None, typer.Option(help="URL of the pages of experts that `workbench export RUN neuronpedia` wrote.")
    ] = None,
    scan: Annotated[
        str | None,
        typer.Option(
            help="Id of the model at Neuronpedia, or ./data/FOLDER of pages for circuit-tracer's viewer. "
            "(default: gpt-oss-20b or gpt-oss-120b by shape, else gpt-oss)"
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Run of the same model whose labels (`workbench label RUN`) name the experts in the JSON."),
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
    ablate: Annotated[
        int,
        typer.Option(
            min=0, help="Also ablate the N most influential heads, experts and features, each by itself, in the model."
        ),
    ] = 0,
    ablate_edges: Annotated[
        int,
        typer.Option(min=0, help="Also ablate the N strongest edges into heads and experts, each by itself."),
    ] = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    ignore_field: IgnoreField = None,
    adapter: Adapter = None,
    overwrite: Overwrite = False,
) -> None:
    """Explain one token of the model's answer by an attribution graph.

    The values that are printed are contributions to the logit while attention, norms and routing are held fixed.
    --ablate and --ablate-edges also print by how much the logit falls when a node writes nothing, or when one node does
    not read another one, and nothing is held fixed.
    """
    from workbench import harmony
    from workbench.experiments import graph_checks, graph_details, graph_export
    from workbench.experiments.attribution_graph import graph as make
    from workbench.experiments.dictionary_features import load_autoencoders
    from workbench.outputs import check_output, staged

    inputs: list[str | Path] = [model, *(sae or []), *([adapter] if adapter else []), *([labels] if labels else [])]
    check_output(out, command="graph", inputs=inputs, overwrite=overwrite)
    loaded = load_model(model, device, dtype, ignore_field, adapter)
    names = {} if labels is None else _expert_labels(loaded, labels)
    ids = harmony.render([{"role": "user", "content": prompt}], effort=effort, tokenizer=loaded.tokenizer)
    (answer,) = loaded.generate([ids], max_new_tokens=max_new_tokens)
    place = _place(loaded, ids, answer, at)
    wanted: Any = answer[place] if target is None else target
    options: dict[str, Any] = {"target": wanted, "against": against, "node_share": nodes, "edge_share": edges}
    made = make(loaded, [*ids, *answer[:place]], saes=load_autoencoders(sae or [], loaded.device), **options)
    inner = made.nodes[made.nodes["kind"].isin(("head", "expert", "feature"))].nlargest(max(5, ablate), "influence")
    measured = graph_checks.ablate(loaded, made, inner.index[:ablate].tolist())["measured"].tolist() if ablate else []
    effects = {
        graph_export.node_id(loaded, made, row): value
        for (_, row), value in zip(inner.iloc[:ablate].iterrows(), measured, strict=True)
    }
    described = _described(made, inner, measured)  # before experts are divided into neurons
    described += _described_edges(loaded, made, ablate_edges)
    if neurons:
        made = graph_details.with_neurons(loaded, made, top=neurons)
    chosen = graph_details.choice_edges(loaded, made) if choices else None
    with staged(out, command="graph", inputs=inputs, overwrite=overwrite) as part:
        if out.suffix == ".graphml":
            import networkx

            networkx.write_graphml(graph_export.to_networkx(made, chosen), part)
        else:
            more: dict[str, Any] = {"labels": names, "choices": chosen, "measured": effects}
            graph_export.write_json(loaded, made, part, scan=scan, features_url=features, **more)
    print(f"answer: {loaded.tokenizer.decode(answer)}")
    print(f"explained: token {place} of the answer, {loaded.tokenizer.decode([answer[place]])!r}")
    print(described)
    print(out)


@app.command()
def graph_ablation(
    graph: Annotated[Path, typer.Argument(help="JSON file that `workbench graph` wrote.")],
    model: Annotated[str, typer.Option(help="The model of the graph, as for `graph`.")],
    out: Annotated[Path, typer.Option(help="JSON file to write: the graph with the measured effects.")],
    node: Annotated[
        list[str] | None,
        typer.Option(
            help="Id of a node to ablate, as 1_2_17; repeat for several. (default: the most influential heads, experts "
            "and neurons)"
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=200, help="Without --node, ablate this many nodes.")] = 5,
    sae: Annotated[
        list[Path] | None, typer.Option(help="Folder of an autoencoder that the graph was made with; may be repeated.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    ignore_field: IgnoreField = None,
    adapter: Adapter = None,
    overwrite: Overwrite = False,
) -> None:
    """Ablate heads, experts, neurons and features of an attribution graph in the model.

    Each node writes nothing at its token, by itself and then all of them together, and the model's logit is measured
    with nothing held fixed. Printed are the predicted effect (what the node adds to the target in the graph) and the
    measured one (by how much the target falls). The dashboard's page Why this token runs this command.
    """
    from workbench.experiments import graph_ablation
    from workbench.experiments.dictionary_features import load_autoencoders
    from workbench.outputs import check_output, staged

    inputs: list[str | Path] = [graph, *(sae or []), *([adapter] if adapter else [])]
    check_output(out, command="graph-ablation", inputs=inputs, overwrite=overwrite)
    content = graph_ablation.read_file(graph)
    loaded = load_model(model, device, dtype, ignore_field, adapter)
    saes = load_autoencoders(sae or [], loaded.device)
    effects = graph_ablation.measure(loaded, content, node or (), top=top, saes=saes)
    with staged(out, command="graph-ablation", inputs=inputs, overwrite=overwrite) as part:
        part.write_text(json.dumps(graph_ablation.with_effects(content, effects), allow_nan=False) + "\n", "utf-8")
    for row in effects.nodes.to_dict("records"):
        predicted, measured = signed(row["value"], 2), signed(row["measured"], 2)
        print(f"{row['id']} {row['label']}: predicted {predicted}, measured {measured} logits")
    if len(effects.nodes) > 1:
        alone = effects.nodes["measured"].sum()
        print(
            f"all {len(effects.nodes)} together: measured {signed(effects.together, 2)} logits; one by one they add "
            f"up to {signed(alone, 2)}"
        )
    print(out)


def _expert_labels(model: Any, path: str) -> dict[tuple[int, int], str]:
    """Return the labels of a run's experts, (layer, expert) → label.

    Raises:
        InputError: the run is of another checkpoint, or has no labels.
    """
    from workbench.runs import open_run
    from workbench.studies import expert_labels

    run = open_run(path)
    if run.checkpoint["digest"] != model.checkpoint.digest:
        raise InputError(f"--labels {path}: the run was captured from another checkpoint than MODEL")
    table = expert_labels.read(run)
    if table is None:
        raise InputError(f"--labels {path}: the run has no labels: make them with `workbench label {path}`")
    return {(int(row["layer"]), int(row["expert"])): row["label"] for row in table.to_dict("records") if row["label"]}


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
        raise InputError(
            "the answer has no final channel to explain: raise --max-new-tokens, "
            "or choose a token of another channel with --at"
        )
    return starts[0]


def _described(attributed: Any, inner: Any, measured: list[float]) -> str:
    """Return the graph, how complete it is, and each of its most influential nodes; some of them were ablated."""
    from workbench.experiments.graph_export import label

    m = attributed.metadata
    lines = [
        repr(attributed).strip("<>"),
        f"  complete: paths add up to the logit within {m['completeness_of_paths']:.1e} logits. Kept nodes: "
        f"{m['kept_influence']:.0%} of the influence of the {m['considered_nodes']:,} largest of "
        f"{count_of(m['nodes_in_pass'], 'node')}; edges from them: {m['kept_of_target']:.0%} of the logit; "
        f"{m['explained_input']:.0%} of what flows into them is no error.",
    ]
    for i, (_, row) in enumerate(inner.iterrows()):
        text = f"  {label(row)} at token {row['pos']} ({row['token']!r}): {signed(row['value'], 2)} logits"
        lines.append(text + (f", measured by ablation {signed(measured[i], 2)}" if i < len(measured) else ""))
    return "\n".join(lines)


def _described_edges(model: Any, attributed: Any, n: int) -> str:
    """Return a line for each of the n strongest edges into heads and experts, which are ablated."""
    from workbench.experiments import graph_checks
    from workbench.experiments.graph_export import label

    nodes, edges = attributed.nodes, attributed.edges
    sources, targets = (
        nodes.index[nodes["kind"].isin(k)] for k in (("embedding", "head", "expert", "feature"), ("head", "expert"))
    )
    inner = edges[edges["source"].isin(sources) & edges["target"].isin(targets)]
    text = ""
    for source, target in inner.loc[inner["value"].abs().nlargest(n).index, ["source", "target"]].to_numpy().tolist():
        checked = graph_checks.ablate_edge(model, attributed, source, target)
        ends = " → ".join(f"{label(nodes.loc[i])} at token {nodes.loc[i, 'pos']}" for i in (source, target))
        text += (
            f"\n  {ends}: {signed(checked['value'], 2)} logits, measured by ablation {signed(checked['measured'], 2)}"
        )
    return text


@app.command()
@names_damage
def attention(
    run: RunPath,
    id: Annotated[str, typer.Argument(help="Id or number of a sequence.")],
    model: Annotated[str, typer.Option(help="The model that the run was captured from, as for `capture`.")],
    out: Annotated[Path, typer.Option(help="NumPy archive to write.")] = Path("attention.npz"),
    layers: Annotated[str | None, typer.Option(help="Layers, as in 0-3 or 0,2. (default: all)")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Tokens, as in 100-227. (default: from 0, as many as fit 4 million values)")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    ignore_field: IgnoreField = None,
    adapter: Adapter = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the attention patterns of one sequence, with the learned sink as a column of its own.

    One forward pass of the model computes them. The dashboard's page Attention runs this command when it is opened.
    """
    from workbench.experiments import attention_patterns
    from workbench.experiments.from_run import transcripts
    from workbench.outputs import check_output, staged
    from workbench.runs import open_run
    from workbench.runs.attention_file import write

    inputs: list[str | Path] = [run, model, *([adapter] if adapter else [])]
    check_output(out, command="attention", inputs=inputs, overwrite=overwrite)
    opened = open_run(run)
    known = opened.sequences
    numbers = [int(n) for n in known.index[(known["id"] == id) | (known.index.astype(str) == id)]]
    if not numbers:
        raise InputError(f"{id!r} is not in {run}: it has {len(known)} sequences, such as {', '.join(known['id'][:3])}")
    chosen = None if layers is None else [n for first, last in _ranges(layers, "--layers") for n in range(first, last)]
    start, stop = (0, None) if tokens is None else _ranges(tokens, "--tokens")[0]
    loaded = load_model(model, device, dtype, ignore_field, adapter)
    if loaded.checkpoint.digest != opened.checkpoint["digest"]:
        raise InputError(f"{run} was captured from another checkpoint than {model}: give the captured one with --model")
    (row,) = transcripts(opened, numbers[:1])
    patterns = attention_patterns.load(loaded, list(row.tokens), layers=chosen, start=start, stop=stop)
    patterns.attrs |= {"run_digest": opened.digest, "sequence": numbers[0], "id": row.id}
    with staged(out, command="attention", inputs=inputs, overwrite=overwrite) as part:
        write(patterns, part)
    sizes = patterns["pattern"].sizes
    print(
        f"{out}: {count_of(sizes['layer'], 'layer')}, {count_of(sizes['head'], 'head')}, {sizes['query']} "
        f"of {count_of(len(row.tokens), 'token')}"
    )


def _ranges(text: str, option: str) -> list[tuple[int, int]]:
    """Return each part of a text such as "0-3,7" as its first number and the one after its last."""
    ranges = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and len(first) < 10 and (not dash or (last.isdecimal() and len(last) < 10))):
            raise InputError(f"{option} {text!r}: expected numbers or ranges of numbers, as in 0-3,7")
        ranges.append((int(first), int(last if dash else first) + 1))
    if not all(first < end and end - first <= 2**20 for first, end in ranges):
        raise InputError(f"{option} {text!r}: a range starts with its smaller number, as in 0-3")
    return ranges
