"""How well nano does: accuracy by family and effort on problems it was never trained on, with intervals.

`python -m workbench.data.evaluate data/nano` writes accuracy.json and the card (README.md) of a checkpoint;
`before` is the same model with its experts not yet packed.
"""

import random
from collections.abc import Callable, Sequence

import pandas as pd
from scipy.stats import binomtest

from workbench import harmony
from workbench.capture.generation import final_text
from workbench.data.conversations import EFFORTS, prompt_messages
from workbench.data.tasks import FAMILIES, Problem, draw
from workbench.model.transformer import GptOss

SEED = 7


def problems(n: int) -> list[Problem]:
    """`n` different problems of every family's test split; fewer where a family has fewer."""
    found: list[Problem] = []
    for family in FAMILIES:
        rng = random.Random(f"{SEED} {family}")
        drawn = {draw(rng, family, test=True): None for _ in range(20 * n)}
        found += list(drawn)[:n]
    return found


def accuracy(model: GptOss, asked: Sequence[Problem], report: Callable[[str], None] = print) -> pd.DataFrame:
    """Greedy answers marked exactly: a row a family and effort, with Wilson 95 % interval and mean new tokens."""
    rows = []
    for effort in EFFORTS:
        prompts = [harmony.render(prompt_messages(p), effort=effort, tokenizer=model.tokenizer) for p in asked]
        new = model.generate(prompts, max_new_tokens=200)
        for problem, prompt, answer in zip(asked, prompts, new, strict=True):
            right = final_text(prompt + answer, model.tokenizer) == problem.answer
            rows.append({"task": problem.task, "effort": effort, "right": right, "tokens": len(answer)})
        report(f"{effort}: {sum(r['right'] for r in rows if r['effort'] == effort)} of {len(asked)} right")
    table = (
        pd.DataFrame(rows)
        .groupby(["task", "effort"], sort=False)
        .agg(n=("right", "size"), right=("right", "sum"), new_tokens=("tokens", "mean"))
    )
    bounds = [
        binomtest(int(r), int(n)).proportion_ci(method="wilson") for r, n in zip(table.right, table.n, strict=True)
    ]
    return table.assign(
        accuracy=table.right / table.n, low=[b.low for b in bounds], high=[b.high for b in bounds]
    ).reset_index()
