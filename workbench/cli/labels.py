"""The command that labels the experts of a run."""

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.options import MAX_SEED, RunPath
from workbench.errors import InputError

app = typer.Typer()


@app.command()
def label(
    run: RunPath,
    host: Annotated[str | None, typer.Option(help="Base URL of an OpenAI-compatible API that proposes labels.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model at the host.")] = None,
    layers: Annotated[
        list[int] | None, typer.Option(help="Propose labels in this layer; repeat for several. [default: all]")
    ] = None,
    key_env: Annotated[str, typer.Option(help="Environment variable with the API key.")] = "OPENAI_API_KEY",
    timeout: Annotated[float, typer.Option(min=1, max=1e6, help="Seconds to wait for an answer.")] = 600.0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the drawn texts.")] = 0,
) -> None:
    """Label the experts of a run, in a file beside it that you may edit.

    Without --host each expert gets an automatic line: over-represented tokens, channel and position. A host proposes
    labels from examples and scores each on others: 0.5 is chance. Labels that you wrote into RUN.labels.jsonl are kept.
    """
    from workbench.runs import open_run
    from workbench.studies import expert_examples, expert_labels, label_proposals

    if (host is None) != (model is None):
        raise InputError("--host and --model go together: give both, or neither for automatic labels")
    opened = open_run(run)
    expert_labels.path_of(opened)
    if wrong := set(layers or ()) - set(range(opened.model["n_layers"])):
        raise InputError(f"--layers {min(wrong)}: the model has layers 0 to {opened.model['n_layers'] - 1}")
    old = expert_labels.read(opened)
    examples = expert_examples.load(opened, seed=seed)
    found = expert_labels.merged(old, expert_labels.automatic(examples))
    path: Path = expert_labels.write(opened, found)
    if host is not None and model is not None:
        from workbench.harmony.hosts.client import Host

        client = Host(host, key_env=key_env, timeout=timeout, retries=4, per_minute=None)
        ask = label_proposals.asker(client, model)
        proposed = label_proposals.propose(opened, examples, ask, name=model, layers=layers or (), seed=seed)
        done = []
        try:
            for row in proposed:
                done.append(row)
                print(f"layer {row['layer']} expert {row['expert']}: {row['proposed']} (score {row['score']:.2f})")
        finally:  # what was proposed before an error is kept
            client.close()
            automatic = expert_labels.automatic(examples)
            found = expert_labels.merged(found, label_proposals.with_proposals(automatic, done))
            expert_labels.write(opened, found)
    edited = int(expert_labels.is_edited(found).sum())
    print(f"{path}: {len(found)} experts, {int((found['proposed'] != '').sum())} proposed, {edited} written by hand")
