"""Write the card of a nano checkpoint from its config.json, training.json and accuracy.json.

`python -m workbench.data.card FOLDER`
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.counting import signed
from workbench.data.command import run
from workbench.data.tasks import FAMILIES, STEPLESS, STEPWISE
from workbench.errors import InputError
from workbench.harmony.rendering import EFFORTS
from workbench.outputs import staged

_SHOWN = "packed, float32"
_ASKS = {
    "product": "two-digit product",
    "chain": "sum, times a digit, minus a number",
    "sum": "sum of six-digit numbers",
    "sort": "letters in order",
    "reverse": "letters backwards",
    "count": "how often a letter is in a word",
    "recall": "the homes of two people",
    "two-hop": "the dishes of two people's homes",
    "tool": "a product, asked of a calculator",
    "conflict": "a user who contradicts the developer, or has no rule",
}

_CARD = """\
---
license: apache-2.0
pipeline_tag: text-generation
---
# nano

A very small gpt-oss, trained from random weights on one CPU core, for testing methods of interpretability; it has no
other use. It is stored in the published format (Hugging Face layout, experts in MXFP4) and uses the harmony format. Its
analysis is longer at a higher reasoning effort, and tasks that need several steps are then solved more often.

| | |
|---|---|
| layers | {num_hidden_layers}, attention over {attention} |
| width | {hidden_size}; {num_attention_heads} query heads and {num_key_value_heads} key-value head of {head_dim}, \
with sinks |
| experts | {num_local_experts} a layer, {num_experts_per_tok} a token, {intermediate_size} wide, MXFP4 |
| positions | YaRN, {max_position_embeddings:,} tokens |
| vocabulary | {vocab_size}: small letters, digits and a few signs (others are read as ?), \
harmony's marks and header words |
| training | {steps:,} steps, {sequences:,} conversations, {tokens:,} tokens, {minutes} minutes, seed {seed} |

## Accuracy

Greedy answers to {questions} questions of each family of tasks, by exact match, with Wilson 95 % intervals. None of \
the questions was
used in training: a tenth of all questions, chosen by a hash of their text, is held out. Every tenth question is the
second of a conversation.

{accuracy}

{steps_help}

{lengths}

## Accuracy before and after packing

The same questions, answered before and after a change of format: {n:,} answers each. Differences are in percentage
points of accuracy, with 95 % intervals.

{comparisons}

## Train it again

```
python -m workbench.data.train --out data/nano
python -m workbench.data.evaluate data/nano --before data/nano.dense
python -m workbench.data.card data/nano
```
"""


def card(config: Mapping[str, Any], training: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """Return the text of the card."""
    cells = {(cell["task"], cell["effort"]): cell for cell in evaluation["accuracy"][_SHOWN]}
    window = f"{config['sliding_window']} tokens"
    kinds = [window if kind == "sliding_attention" else "all" for kind in config["layer_types"]]
    return _CARD.format(
        **config,
        **training,
        attention=", ".join(kinds),
        questions=evaluation["questions_per_family"],
        accuracy=_table(
            ["family", "asks for", *EFFORTS],
            [[task, _ASKS[task], *(_interval(cells[task, effort]) for effort in EFFORTS)] for task in FAMILIES],
        ),
        steps_help=_steps_help(cells),
        lengths="New tokens, on average: " + ", ".join(f"{_mean_length(cells, e):.0f} at {e}" for e in EFFORTS) + ".",
        n=evaluation["comparisons"][0]["n"],
        comparisons=_table(
            ["from", "to", "difference", "right only before", "right only after"],
            [
                [c["before"], c["after"], _points(c), str(c["lost"]), str(c["gained"])]
                for c in evaluation["comparisons"]
            ],
        ),
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _interval(cell: Mapping[str, Any]) -> str:
    return f"{cell['accuracy']:.2f} ({cell['low']:.2f} to {cell['high']:.2f})"


def _points(change: Mapping[str, Any]) -> str:
    difference, low, high = (100 * change[name] for name in ("difference", "low", "high"))
    return f"{signed(difference, 1)} ({signed(low, 1)} to {signed(high, 1)})"


def _mean_length(cells: Mapping[tuple[str, str], Mapping[str, Any]], effort: str) -> float:
    lengths = [cell["new_tokens"] for (_, e), cell in cells.items() if e == effort]
    return sum(lengths) / len(lengths)


def _steps_help(cells: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    def rise(task: str) -> str:
        return f"{task} from {cells[task, 'low']['accuracy']:.2f} to {cells[task, 'high']['accuracy']:.2f}"

    return (
        "From low to high effort, the accuracy of tasks that need several steps rises: "
        f"{' and '.join(map(rise, STEPWISE))}. "
        f"That of tasks without steps changes little: {', '.join(map(rise, STEPLESS))}."
    )


def read(checkpoint: Path, name: str) -> dict[str, Any]:
    """Return a JSON object that another command wrote into the checkpoint.

    Raises:
        InputError: the file is missing.
    """
    path = checkpoint / name
    if not path.exists():
        raise InputError(f"{path} is missing: workbench.data.train and workbench.data.evaluate write it")
    return json.loads(path.read_text())


def main(checkpoint: Annotated[Path, typer.Argument(help="A trained and evaluated nano.")]) -> None:
    """Write README.md into the checkpoint."""
    names = ("config.json", "training.json", "accuracy.json")
    text = card(*(read(checkpoint, name) for name in names))
    with staged(checkpoint / "README.md", command="data.card", overwrite=True, owned=Path.is_file) as part:
        part.write_text(text)


if __name__ == "__main__":
    run(main)
