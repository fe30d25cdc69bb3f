"""The content of pages as pure functions of a run and of a study's datasets: tables and text, no widgets."""

import re
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from workbench.counting import count_of, signed, signed_interval
from workbench.errors import InputError
from workbench.harmony.flags import counted_in
from workbench.harmony.messages import EFFORTS
from workbench.runs import Run
from workbench.studies.comparison import in_order

_SKIPPED = "Skipped: "
_QUIET = (_SKIPPED, "Warning: ")  # how lines of a summary begin that are less prominent


def about(run: Run) -> str:
    """Return one paragraph of HTML about the run. All text from the run is escaped."""
    sequences = run.sequences
    done, total = run.progress
    efforts = ", ".join(f"{n} {effort}" for effort, n in sequences["effort"].value_counts(sort=False).items())
    parts = {
        "Model": f"{run.checkpoint['name']}: {run.model['n_layers']} layers, {number_of_experts(run.model)} experts, "
        f"{run.model['experts_per_token']} per token",
        "Transcripts": f"{len(sequences):,} ({efforts}), {int(sequences['length'].sum()):,} tokens",
        "Recorded": ", ".join(run.recorded),
        **({} if done == total else {"State": f"in progress: {done} of {count_of(total, 'unit')}"}),
    }
    return facts(parts)


def facts(parts: Mapping[str, str]) -> str:
    """Return names and values as one line of HTML; all text is escaped."""
    items = "".join(f"<span><b>{escape(name)}</b> {escape(text)}</span>" for name, text in parts.items())
    return f"<div class='wb-facts'>{items}</div>"


def number_of_experts(model: Mapping[str, Any]) -> str:
    """Return the number of experts of a layer as text, or the least and the most where layers differ."""
    own = model.get("layer_experts")
    return f"{min(own)} to {max(own)}" if own else str(model["num_experts"])


def accuracy_by_effort(run: Run) -> pd.DataFrame:
    """Return the accuracy (%) of graded transcripts by task (rows) and effort (columns)."""
    marked = run.sequences.query("correct >= 0")
    order = [effort for effort in EFFORTS if effort in set(marked["effort"])]
    by_task = marked.pivot_table(index="task", columns="effort", values="correct", aggfunc="mean")[order]
    overall = marked.groupby("effort")["correct"].mean()[order].rename("all tasks")
    table = 100 * pd.concat([by_task, overall.to_frame().T])
    return table.round(1).rename(columns="{} (%)".format).rename_axis("task").reset_index()


def tokens_by_role(run: Run) -> pd.DataFrame:
    """Return content tokens by role and channel (rows) and effort (columns)."""
    messages = run.messages
    last = messages["stop"].where(messages["stop"] >= 0, messages["end"])  # a truncated message has no stop token
    messages = messages.assign(tokens=(last - messages["content"]).where(messages["content"] >= 0, 0))
    messages = messages.assign(effort=messages["sequence"].map(run.sequences["effort"]).replace("", "unstated"))
    table = messages.pivot_table(
        index=["role", "channel"], columns="effort", values="tokens", aggfunc="sum", fill_value=0
    )
    table = table[in_order(list(table.columns))]
    return table.assign(all=table.sum(axis=1)).reset_index()


def method(study: Mapping[str, xr.Dataset]) -> str:
    """Return HTML with the method of a study and what it does not control."""
    methods = dict.fromkeys((r.attrs["method"], r.attrs["not_controlled"]) for r in study.values())
    first = next(iter(study.values())).attrs
    origin = f"Run {first['run_digest']}, workbench {first['workbench_version']}, seed {first['seed']}."
    paragraphs = [f"{escape(how)} <i>Not controlled:</i> {escape(limits)}" for how, limits in methods]
    return "".join(f"<p>{text}</p>" for text in [*paragraphs, escape(origin)])


def findings(study: Mapping[str, xr.Dataset]) -> str:
    """Return HTML with the summaries of a study: the first one in full, the others folded to their first line.

    Models of the results and of activations, which need more explanation, come after what they explain.
    """
    parts = []
    for number, result in enumerate(sorted(study.values(), key=_explains)):
        opened = " open" if number == 0 else ""
        text = str(result.attrs["summary"])
        first = next((line for line in text.splitlines() if line.strip() and not line.startswith(_QUIET)), "")
        heading = f"<b>{escape(result.attrs['title'])}</b> <span class='wb-preview'>{_text(first)}</span>"
        parts.append(f"<details{opened}><summary>{heading}</summary>{_summary(text)}</details>")
    return "".join(parts)


def _explains(result: xr.Dataset) -> bool:
    """Return whether a result is a model of others or about activations at a hook point."""
    title = str(result.attrs["title"])
    return "model" in title.lower() or title.startswith("hook_")


def _summary(text: str) -> str:
    """Return HTML of a summary: its first line as a lead, the others as a list, indented lines below their own.

    There is no lead where the first line is one of several alike, as `low: …`, `medium: …`.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    lead, rest = (lines[:1], lines[1:]) if not _alike(lines[:2]) else ([], lines)
    items: list[tuple[str, list[str]]] = []
    for line in rest:
        if line.startswith(" ") and items and not items[-1][0].startswith((" ", *_QUIET)):
            items[-1][1].append(line)
        else:
            items.append((line, []))
    skipped = [line for line, _ in items if line.startswith(_SKIPPED)]
    shown = "".join(
        _item(line, f"<ul>{''.join(map(_item, below))}</ul>" if below else "")
        for line, below in items
        if line not in skipped
    )
    text = "".join(f"<p class='wb-first'>{_text(line)}</p>" for line in lead)
    text += f"<ul class='wb-answers'>{shown}</ul>" if shown else ""
    return text + not_tested([line.removeprefix(_SKIPPED) for line in skipped])


def not_tested(lines: Sequence[str]) -> str:
    """Return HTML that folds the comparisons that could not be tested, each with its reason; "" without any."""
    if not lines:
        return ""
    items = "".join(f"<li>{_text(line[:1].upper() + line[1:])}</li>" for line in lines)
    return f"<details><summary>Not tested ({len(lines)})</summary><ul class='wb-muted'>{items}</ul></details>"


def _text(line: str) -> str:
    """Return a line as HTML, with a space before each percent sign, as everywhere on the pages."""
    return re.sub(r"(?<=[0-9])%", "\u202f%", escape(line.strip()))


def _alike(lines: Sequence[str]) -> bool:
    """Return whether two lines begin with a label of at most five words and a colon."""
    label = re.compile(r"(?! |Warning|Skipped|No )(\S+ ){0,4}\S+: ")
    return len(lines) == 2 and all(label.match(line) for line in lines)


def _item(line: str, below: str = "") -> str:
    """Return an element of a list; warnings and what was skipped are less prominent. below: HTML inside it."""
    quiet = " class='wb-muted'" if line.strip().startswith(_QUIET) else ""
    return f"<li{quiet}>{_text(line)}{below}</li>"


def progress(run: Run) -> str:
    """Return HTML with the progress of a run."""
    done, total = run.progress
    if run.status == "complete":
        return f"<b>Complete</b>: {count_of(total, 'unit')}."
    tokens = sum(span.stop - span.start for span in run.spans)
    return (
        f"<b>In progress</b>: {done} of {count_of(total, 'unit')}, {tokens:,} tokens. <progress max={total} "
        f"value={done} "
        'style="width:60%"></progress>'
    )


def provenance(run: Run) -> str:
    """Return HTML with the provenance of a run as a table."""
    rows = {**run.provenance, "digest": run.digest, "checkpoint": run.checkpoint}
    rows.pop("rejects", None)
    if flags := counted_in(run.sequences):
        rows["flags of sequences"] = flags
    if run.exclusion:
        rows["excluded"] = run.exclusion
    cells = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in rows.items())
    return f"<table>{cells}</table>"


def about_sequence(run: Run, number: int) -> str:
    """Return one paragraph of HTML about a conversation."""
    row = run.sequences.loc[[number]].to_dict("records")[0]
    right = {1: "correct", 0: "wrong"}.get(int(row["correct"]), "not graded")
    parts = {
        "Id": row["id"],
        "Task": row["task"] or "–",
        "Effort": row["effort"] or "–",
        "Tokens": f"{int(row['length']):,}",
        "Expected": row["answer"] or "–",
        "Answer": right,
        **({"Irregular": str(row["flags"]).replace("_", " ")} if row.get("flags") else {}),
    }
    return facts(parts)


def graph_command(run: Run, number: int, model: str) -> str:
    """Return the command that explains a token of an answer, or "" if the prompt is not one message of a user."""
    row = run.sequences.loc[[number]].to_dict("records")[0]
    try:
        messages = run.conversation(number)
    except InputError:
        return ""
    asked = [m for m in messages if m["role"] in ("user", "developer", "tool")]
    if len(asked) != 1 or asked[0]["role"] != "user" or not row["effort"] or "://" in str(run.path):
        return ""
    name = re.sub(r"[^A-Za-z0-9]+", "-", str(row["id"])).strip("-")
    out = Path(str(run.path)).with_name(f"{name}-graph.json")
    prompt = str(asked[0]["text"])
    return shlex.join(
        ["workbench", "graph", model, "--prompt", prompt, "--effort", str(row["effort"]), "--out", str(out)]
    )


def partners(pairs: xr.Dataset, channel: str, layer: int, expert: int, most: int = 6) -> pd.DataFrame:
    """Return the experts that are most often co-activated with an expert, relative to chance."""
    cell = pairs.sel(channel=channel, layer=layer, expert=expert)
    table = pd.DataFrame(
        {"with expert": cell["expert_2"].values, "lift": cell["lift"].values, "P(with | this)": cell["given"].values}
    )
    table = table[table["with expert"] != expert].dropna().sort_values("lift", ascending=False)
    return table.head(most).round(3)


def gains(gain: xr.Dataset, task: str) -> str:
    """Return HTML with the gain of each effort step in one task, with intervals."""
    lines = []
    for step in map(str, gain["step"].values):
        c = {str(k): float(v) for k, v in gain.sel(task=task, step=step).data_vars.items()}
        lines.append(
            f"{step}: {signed(c['more_tokens'], 1)} analysis tokens [{signed(c['more_tokens_low'], 1)}, "
            f"{signed(c['more_tokens_high'], 1)}], accuracy "
            f"{signed_interval(100 * c['gain'], 100 * c['gain_low'], 100 * c['gain_high'], 1)} points"
        )
    return "<br>".join(map(escape, lines))


def about_head(run: Run, layer: int, head: int) -> str:
    """Return one sentence about the window and the key-value group of a head."""
    window = (run.model.get("windows") or [None] * run.model["n_layers"])[layer]
    group = run.model["n_heads"] // run.model["n_key_value_heads"]
    sees = f"the last {window} keys" if window else "all previous keys"
    return (
        f"Attends to {sees}; shares its keys and values with heads {head // group * group} to "
        f"{head // group * group + group - 1}."
    )
