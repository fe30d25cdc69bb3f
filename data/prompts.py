"""Write held-out questions for nano as prompts: `python -m workbench.data.prompts FILE`.

The file is an input of `workbench generate`: one row for each prompt, twenty of every family.
"""

import json
import random
from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.counting import count_of
from workbench.data.command import run
from workbench.data.conversations import FIRST_TURNS, prompt_messages
from workbench.data.tasks import FAMILIES, Problem, draw
from workbench.errors import InputError
from workbench.outputs import staged

SEED = 7
PER_FAMILY = 20
_DRAWS = 20  # for each question wanted: small families repeat themselves
_TWO_TURNS = 10  # every tenth question follows another, as in training


def questions(per_family: int) -> list[tuple[Problem, ...]]:
    """Return different problems of the test split of every family; of a tuple the last one is asked.

    Raises:
        InputError: a family has fewer test questions than asked for.
    """
    asked: list[tuple[Problem, ...]] = []
    for family in FAMILIES:
        rng = random.Random(f"{SEED} {family}")
        drawn = list(dict.fromkeys(draw(rng, family, test=True) for _ in range(_DRAWS * per_family)))[:per_family]
        if len(drawn) < per_family:
            raise InputError(f"{family} has {len(drawn)} test questions, {per_family} were requested: request fewer")
        for i, problem in enumerate(drawn):
            second = i % _TWO_TURNS == _TWO_TURNS - 1
            asked.append((draw(rng, rng.choice(FIRST_TURNS), test=True), problem) if second else (problem,))
    return asked


def rows(per_family: int = PER_FAMILY) -> list[dict[str, Any]]:
    """Return the questions as prompt rows."""
    return [
        {
            "id": f"{turns[-1].task}-{i % per_family:02d}",
            "messages": prompt_messages(*turns),
            "expected": turns[-1].answer,
            "meta": {"task": turns[-1].task, "domain": turns[-1].domain, "turns": len(turns)},
        }
        for i, turns in enumerate(questions(per_family))
    ]


def main(out: Annotated[Path, typer.Argument(help="The file to write or to replace.")]) -> None:
    """Write the bundled prompts."""
    written = rows()
    with staged(out, command="data.prompts", overwrite=True, owned=Path.is_file) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in written))
    print(f"{out}: {count_of(len(written), 'prompt')} of {len(FAMILIES)} families")


if __name__ == "__main__":
    run(main)
