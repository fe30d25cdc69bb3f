"""What a model answers: texts, lengths and correctness, with intervals that count prompts, not samples.

An answer is correct if the text of its final message, without white space around it, is the prompt's `expected`. One
that was cut off before its final message ended is wrong. Of prompts without `expected` correctness is unknown.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench import harmony
from workbench.capture.generation import answer_prompts, final_text
from workbench.errors import InputError
from workbench.harmony.messages import EFFORTS
from workbench.harmony.transcripts import Prompt, Transcript, read_prompts, read_transcripts
from workbench.hooks.edits import Edit
from workbench.hooks.interventions import applied
from workbench.model.transformer import GptOss
from workbench.research.recipe import Recipe
from workbench.runs import Run
from workbench.studies.intervals import few_prompts, ratio, share_of_answers
from workbench.studies.run_index import independent_prompts

Prompts = str | Path | Sequence[str] | Sequence[Mapping[str, Any]] | Sequence[Prompt]


@dataclass(frozen=True)
class Answers:
    """Answers to prompts. table: one row for each answer, with prompt_id, effort, analysis, text, expected, correct,
    complete, new_tokens. transcripts: the same as ids, for `capture` and `write_transcripts`."""

    table: pd.DataFrame
    transcripts: list[Transcript]

    def accuracy(self, by: str | Sequence[str] = "effort") -> pd.DataFrame:
        """Return accuracy and lengths with intervals; see `wb.accuracy`."""
        return accuracy(self.table, by=by)

    def _repr_html_(self) -> str:
        html: str = self.table.to_html(max_rows=20)
        return html


def answers(
    model: GptOss,
    prompts: Prompts,
    recipe: Recipe | Edit | Sequence[Edit] = (),
    *,
    effort: str | Sequence[str] = EFFORTS,
    samples: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 512,
    seed: int = 0,
    batch: int = 64,
    correct: Callable[[str, str], bool] | None = None,
) -> Answers:
    """Return the answers of a model to prompts at one or several efforts, under a recipe of interventions.

    prompts: a file, texts, or rows with messages and perhaps `expected`. recipe: edits of `wb.hooks.interventions`, as
    steer(…) or forbid(…), or a `Recipe`, of which the interventions are used; in force while the model generates.
    correct(text, expected): another rule of correctness.

    Raises:
        InputError: an effort is unknown, a prompt is too long, or samples at temperature 0 would be equal.
    """
    if isinstance(recipe, Recipe):
        recipe.check_other_prompts()
        edits = recipe.edits(model)
    else:
        edits = [recipe] if isinstance(recipe, Edit) else list(recipe)
    efforts = [effort] if isinstance(effort, str) else list(effort)
    with applied(model, *edits) if edits else nullcontext():
        rows = answer_prompts(
            model,
            _prompts(prompts),
            efforts=efforts,
            samples=samples,
            temperature=temperature,
            seed=seed,
            max_new_tokens=max_new_tokens,
            batch=batch,
        )
    if correct is not None:
        rows = [_judged(row, correct, model.tokenizer) for row in rows]
    return Answers(_table(rows, model.tokenizer), rows)


def accuracy(
    source: str | Path | Run | pd.DataFrame | Sequence[Transcript],
    *,
    by: str | Sequence[str] = "effort",
    model: GptOss | None = None,
) -> pd.DataFrame:
    """Return a row for each effort (or other labels): accuracy and mean new tokens with 95 % intervals, and counts.

    source: a run, transcripts or their file (tokens of another vocabulary than o200k_harmony need `model`), or a table
    with prompt_id and correct. The accuracy of a row is the mean over its prompts with Wilson's interval, whose sample
    size the variance between prompts implies, as in the study `effort`: several samples of one prompt are not
    independent, and neither are prompts of a run with the same tokens. Fewer than five prompts have no interval (NaN),
    and `note` states it, as it does of fewer than twenty. Answers of unknown correctness count in `unknown` alone.

    Raises:
        InputError: a label is missing, or no answer is known to be correct or wrong.
    """
    table = _rows_of(source, model)
    names = [by] if isinstance(by, str) else list(by)
    if missing := [n for n in (*names, "prompt_id", "correct") if n not in table]:
        raise InputError(f"{missing[0]!r} is not a column: the table has {', '.join(map(str, table.columns))}")
    known = table["correct"].notna() & (table["correct"].astype(float) >= 0)
    if not known.any():
        raise InputError("no row has `correct`: give prompts `expected` before generating, or rows `correct`")
    rows = []
    for values, own in table.assign(_known=known).groupby(names, sort=False):
        counted = own[own["_known"]]
        row = dict(zip(names, values if isinstance(values, tuple) else (values,), strict=True))
        right, n = _by_prompt(counted, "correct")
        row |= _with_limits("accuracy", share_of_answers(right, n))
        row |= {"answers": len(counted), "unknown": len(own) - len(counted), "prompts": len(n)}
        if "new_tokens" in table:
            row |= _with_limits("new_tokens", ratio(*_by_prompt(counted, "new_tokens")))
        rows.append(row | {"note": few_prompts(len(n))})
    ranks = {effort: i for i, effort in enumerate(EFFORTS)}
    return pd.DataFrame(rows).sort_values(
        names, key=lambda column: column.map(lambda v: ranks.get(v, v)), ignore_index=True
    )


def _by_prompt(table: pd.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Return sum and number of a column's values by prompt."""
    grouped = table.astype({column: float}).groupby("prompt_id")[column]
    return grouped.sum().to_numpy(), grouped.count().to_numpy()


def _with_limits(name: str, values: Sequence[Any]) -> dict[str, float]:
    return {f"{name}{end}": float(value) for end, value in zip(("", "_low", "_high"), values, strict=True)}


def _prompts(prompts: Prompts) -> list[Prompt]:
    """Return prompts of a file, of texts, or of rows."""
    if isinstance(prompts, str | Path):
        if not Path(prompts).exists() and isinstance(prompts, str) and not prompts.endswith((".jsonl", ".json")):
            raise InputError(f"prompts {prompts[:40]!r}: give a file, or a list of texts, as in [{prompts[:20]!r}]")
        return read_prompts(prompts)
    read = []
    rows: Sequence[Any] = prompts
    for number, row in enumerate(rows):
        if isinstance(row, Prompt):
            read.append(row)
        elif isinstance(row, str):
            read.append(Prompt(f"prompt-{number}", [{"role": "user", "content": row}]))
        else:
            expected = row.get("expected", row.get("answer"))
            read.append(
                Prompt(
                    str(row.get("id", f"prompt-{number}")), list(row["messages"]), expected, dict(row.get("meta", {}))
                )
            )
    return read


def _judged(row: Transcript, correct: Callable[[str, str], bool], tokenizer: harmony.Tokenizer) -> Transcript:
    text = final_text(row.tokens, tokenizer)
    return row if row.answer is None else replace(row, correct=text is not None and bool(correct(text, row.answer)))


def _table(rows: Sequence[Transcript], tokenizer: harmony.Tokenizer) -> pd.DataFrame:
    """Return a row for each transcript."""
    return pd.DataFrame([_row(row, tokenizer) for row in rows])


def _row(row: Transcript, tokenizer: harmony.Tokenizer) -> dict[str, Any]:
    labels = harmony.label(row.tokens, tokenizer=tokenizer, n_prompt=row.n_prompt)
    new = [m for m in labels.messages if m.end > row.n_prompt]
    text = {
        channel: "\n".join(tokenizer.decode(row.tokens[m.text_span].tolist()) for m in new if m.channel == channel)
        for channel in ("analysis", "final")
    }
    complete = bool(new) and new[-1].closed_by in ("return", "call", "end")
    return {
        "id": row.id,
        "prompt_id": row.prompt_id,
        "effort": row.effort,
        "analysis": text["analysis"],
        "text": text["final"],
        "expected": row.answer,
        "correct": row.correct,
        "complete": complete,
        "new_tokens": len(row.tokens) - row.n_prompt,
        **{k: v for k, v in row.meta.items() if k in ("task", "domain")},
    }


def _rows_of(source: Any, model: GptOss | None) -> pd.DataFrame:
    if isinstance(source, pd.DataFrame):
        return source
    if isinstance(source, Run):
        table = source.sequences
        return table.assign(
            prompt_id=independent_prompts(source)[table.index],
            correct=table["correct"].where(table["correct"] >= 0),
            new_tokens=table["length"] - table["n_prompt"],
        )
    if isinstance(source, str | Path):
        if Path(source).is_dir():
            from workbench.runs import open_run

            return _rows_of(open_run(source), model)
        tokenizer = harmony.tokenizer() if model is None else model.tokenizer
        source, rejects = read_transcripts(source, tokenizer=tokenizer)
        if not source:
            raise InputError(f"no transcript can be read; the first of {len(rejects)}: {rejects[0].reason}")
    columns = ({"prompt_id": r.prompt_id, "effort": r.effort, "correct": r.correct, **r.meta} for r in source)
    lengths = [len(r.tokens) - r.n_prompt for r in source]
    return pd.DataFrame(list(columns)).assign(new_tokens=lengths)
