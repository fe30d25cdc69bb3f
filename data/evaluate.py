"""Measure the accuracy of nano by family and effort on held-out problems, before and after packing.

`python -m workbench.data.evaluate data/nano --before data/nano.dense` writes accuracy.json into the checkpoint.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from scipy.stats import binomtest

from workbench import harmony
from workbench.capture.generation import final_text
from workbench.counting import signed
from workbench.data.command import run
from workbench.data.conversations import prompt_messages
from workbench.data.prompts import SEED, questions
from workbench.data.tasks import Problem
from workbench.harmony.rendering import EFFORTS
from workbench.model import GptOss, load
from workbench.outputs import check_output, staged
from workbench.progress import progress

_Z = 1.96
_BATCH = 100
_MAX_NEW_TOKENS = 200


def answers(model: GptOss, asked: Sequence[tuple[Problem, ...]], label: str) -> pd.DataFrame:
    """Return greedy answers, one row for each question and effort.

    Columns: task, effort, right (the final text is exact), tokens (number of new tokens).
    """
    rows = []
    with progress(label, len(asked) * len(EFFORTS), "answers") as advance:
        for effort in EFFORTS:
            for start in range(0, len(asked), _BATCH):
                some = asked[start : start + _BATCH]
                prompts = [harmony.render(prompt_messages(*t), effort=effort, tokenizer=model.tokenizer) for t in some]
                new = model.generate(prompts, max_new_tokens=_MAX_NEW_TOKENS)
                for turns, prompt, generated in zip(some, prompts, new, strict=True):
                    right = final_text(prompt + generated, model.tokenizer) == turns[-1].answer
                    rows.append({"task": turns[-1].task, "effort": effort, "right": right, "tokens": len(generated)})
                advance(len(some))
    return pd.DataFrame(rows)


def accuracy(marked: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each family and effort: n, right, accuracy, its Wilson 95 % interval and mean new_tokens."""
    table = marked.groupby(["task", "effort"], sort=False).agg(
        n=("right", "size"), right=("right", "sum"), new_tokens=("tokens", "mean")
    )
    bounds = [binomtest(r, n).proportion_ci(method="wilson") for r, n in table[["right", "n"]].to_numpy().tolist()]
    return table.assign(
        accuracy=table["right"] / table["n"], low=[b.low for b in bounds], high=[b.high for b in bounds]
    ).reset_index()


def paired(before: pd.DataFrame, after: pd.DataFrame) -> dict[str, float]:
    """Return how many answers to the same questions a change lost and gained, and the difference of accuracy.

    The interval (low, high) is the normal one for a paired difference of proportions.
    """
    was, now = before["right"].to_numpy(bool), after["right"].to_numpy(bool)
    n, lost, gained = len(was), int((was & ~now).sum()), int((now & ~was).sum())
    difference = (gained - lost) / n
    half = _Z * ((lost + gained) / n - difference**2) ** 0.5 / n**0.5
    return {
        "n": n,
        "lost": lost,
        "gained": gained,
        "difference": difference,
        "low": difference - half,
        "high": difference + half,
    }


def evaluate(checkpoint: Path, before: Path | None, per_family: int) -> dict[str, Any]:
    """Return the accuracy of a checkpoint in float32 and bfloat16, and of the one before packing, as JSON."""
    asked = questions(per_family)
    marked: dict[str, pd.DataFrame] = {}
    if before is not None:
        marked["dense, float32"] = answers(load(before, device="cpu", dtype=torch.float32), asked, "dense, float32")
    for name, dtype in (("packed, float32", torch.float32), ("packed, bfloat16", torch.bfloat16)):
        model = load(checkpoint, device="cpu", dtype=dtype)
        marked[name] = answers(model, asked, name)
    names = list(marked)
    return {
        "checkpoint": model.checkpoint.digest,
        "seed": SEED,
        "questions_per_family": per_family,
        "accuracy": {name: accuracy(table).to_dict("records") for name, table in marked.items()},
        "comparisons": [
            {"before": a, "after": b, **paired(marked[a], marked[b])} for a, b in itertools.pairwise(names)
        ],
    }


def main(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of nano, with packed experts.")],
    before: Annotated[Path | None, typer.Option(help="The same with dense experts, before packing.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="Questions a family, each asked at every effort.")] = 60,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Evaluate nano and write accuracy.json into the checkpoint."""
    torch.set_num_threads(threads)
    out = checkpoint / "accuracy.json"
    check_output(out, command="data.evaluate", overwrite=True, owned=Path.is_file)
    result = evaluate(checkpoint, before, questions)
    with staged(out, command="data.evaluate", overwrite=True, owned=Path.is_file) as part:
        part.write_text(json.dumps(result, indent=1) + "\n")
    for name, cells in result["accuracy"].items():
        print(f"{name}\n{pd.DataFrame(cells).pivot(index='task', columns='effort', values='accuracy')[list(EFFORTS)]}")
    for change in result["comparisons"]:
        print(f"{change['before']} → {change['after']}: {signed(100 * change['difference'], 1)} points")


if __name__ == "__main__":
    run(main)
