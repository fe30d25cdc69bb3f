"""The command that labels the experts of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.cli.damage import names_damage
from workbench.cli.options import MAX_SEED, RunPath
from workbench.counting import count_of
from workbench.errors import InputError

app = typer.Typer()


@app.command()
@names_damage
def label(
    run: RunPath,
    host: Annotated[str | None, typer.Option(help="Base URL of an OpenAI-compatible API that proposes labels.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model at the host.")] = None,
    layers: Annotated[
        list[int] | None, typer.Option(help="Propose labels in this layer; repeat for several. (default: all)")
    ] = None,
    key_env: Annotated[str, typer.Option(help="Environment variable with the API key.")] = "OPENAI_API_KEY",
    timeout: Annotated[float, typer.Option(min=1, max=1e6, help="Seconds to wait for an answer.")] = 600.0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the drawn texts.")] = 0,
) -> None:
    """Label the experts of a run, in a file beside it that you may edit.

    Without --host each expert gets an automatic line: over-represented tokens, channel and position. A host proposes
    labels from examples and scores each on others: 0.5 is chance. Labels that you wrote into RUN.labels.jsonl are kept.
    Rerun the command to resume.
    """
    from workbench.runs import open_run
    from workbench.studies import expert_examples, expert_labels

    if (host is None) != (model is None):
        raise InputError("--host and --model go together: give both, or neither for automatic labels")
    opened = open_run(run)
    path = expert_labels.check(opened)
    if wrong := set(layers or ()) - set(range(opened.model["n_layers"])):
        raise InputError(f"--layers {min(wrong)}: the model has layers 0 to {opened.model['n_layers'] - 1}")
    if host is None or model is None:
        labels = expert_labels.update(opened, expert_labels.automatic(expert_examples.load(opened, seed=seed)))
    else:
        from workbench.harmony.hosts.client import Host

        client = Host(host, key_env=key_env, timeout=timeout, retries=4, per_minute=None)
        try:
            labels = _propose(opened, client, model, path, layers or (), seed)
        finally:
            client.close()
    edited = int(expert_labels.is_edited(labels).sum())
    print(
        f"{path}: {count_of(len(labels), 'expert')}, {int((labels['proposed'] != '').sum())} proposed, "
        f"{edited} written by hand"
    )


def _propose(run: Any, client: Any, model: str, path: Path, layers: Sequence[int], seed: int) -> Any:
    """Let a model propose labels, each on the disk before the next is asked for; those that it proposed are kept."""
    from workbench.file_lock import FileLock
    from workbench.studies import expert_examples, expert_labels, label_proposals

    with FileLock(path.with_name(f"{path.name}.proposals")):
        examples = expert_examples.load(run, seed=seed)
        automatic = expert_labels.automatic(examples)
        labels = expert_labels.merged(expert_labels.read(run), automatic)
        known = label_proposals.proposed_by(labels, model)
        if known:
            have = "has" if len(known) == 1 else "have"
            print(
                f"{path}: {count_of(len(known), 'expert')} {have} labels that {model} proposed; remove their lines to "
                "ask again"
            )
        ask = label_proposals.asker(client, model)
        for row in label_proposals.propose(run, examples, ask, name=model, layers=layers, seed=seed, known=known):
            labels = expert_labels.update(run, label_proposals.with_proposals(automatic, [row]))
            print(f"layer {row['layer']} expert {row['expert']}: {row['proposed']} (score {row['score']:.2f})")
        return expert_labels.update(run, automatic)
