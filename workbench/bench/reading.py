"""The time of queries on a run of random numbers that is as large as one night of capture on an H100.

Routing of every token and the sums of everything, in conversations as harmony has them: a prompt, analysis as long as
the effort, a final answer. Experts are drawn as real ones are, some often and most seldom.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.bench.table import show
from workbench.capture.plan import plan_units
from workbench.counting import count_of
from workbench.harmony.labels import CHANNELS, PARTS
from workbench.harmony.messages import EFFORTS
from workbench.model.config import PUBLISHED
from workbench.progress import progress
from workbench.runs import Run, open_run
from workbench.runs.schema import Layout, Spec, Unit
from workbench.runs.summaries import summarise
from workbench.runs.writer import open_writer

TASKS, MEAN_TOKENS = 8, 1000
CHOICES = 4096  # number of combinations of experts and gates in a layer
SPEC = Spec(routing=True, router_logits=False, sinks=False, logprobs=False, sink_sums=True)


def make(path: str, tokens: int, seed: int) -> None:
    """Write the run, or go on with it."""
    cfg = PUBLISHED["20b"]
    rng = np.random.default_rng(seed)
    n = max(3, tokens // MEAN_TOKENS // 3 * 3)
    mean = np.tile([0.4, 0.8, 1.8], n // 3) * tokens / n
    lengths = np.maximum(64, rng.poisson(mean))
    lengths[-1] = max(64, lengths[-1] + tokens - lengths.sum())
    layout = plan_units(lengths.tolist())
    choices = _choices(rng, cfg.n_layers, cfg.num_experts, cfg.experts_per_token)
    about = {"transcripts": {"digest": f"random {tokens} {seed}", "name": "random"}, "dtype": "bfloat16", "rejects": []}
    tables = _tables(lengths)
    with open_writer(
        path,
        layout=layout,
        sequences=tables["sequences"],
        messages=tables["messages"],
        model=cfg.to_json(),
        checkpoint={"digest": "random", "name": "random"},
        spec=SPEC,
        provenance=about,
    ) as writer:
        pending = writer.pending()
        with progress("random run", len(pending), "units") as advance:
            for index in pending:
                draw = np.random.default_rng((seed, index))
                values, records = _unit(layout, layout.units[index], choices, draw)
                sums = summarise(records, values["sequence"], values["channel"], num_experts=cfg.num_experts)
                share = draw.random((*sums["tokens"].shape, cfg.n_layers, cfg.n_heads), dtype=np.float32)
                sums["sink_sum"] = sums["tokens"][..., None, None] * share
                sums["sink_sumsq"] = sums["sink_sum"] * share
                writer.write_unit(index, values, records, sums)
                advance(1)
        writer.finish()


def _tables(lengths: np.ndarray) -> dict[str, pd.DataFrame]:
    """Return three efforts of every prompt; four messages a sequence: system, user, analysis, final."""
    n = len(lengths)
    ends = np.stack([lengths // 8, lengths // 5, lengths - lengths // 8, lengths], 1)
    starts = np.concatenate([np.zeros((n, 1), int), ends[:, :-1]], 1)
    sequences = pd.DataFrame(
        {
            "id": [f"p{i // 3}/{EFFORTS[i % 3]}/0" for i in range(n)],
            "prompt_id": [f"p{i // 3}" for i in range(n)],
            "effort": [EFFORTS[i % 3] for i in range(n)],
            "n_prompt": ends[:, 1],
            "correct": (np.arange(n) % 5 > 0).astype(np.int8),
            "answer": "",
            "meta": [json.dumps({"task": f"task {i // 3 % TASKS}", "domain": "random"}) for i in range(n)],
        }
    )
    messages = pd.DataFrame(
        {
            "sequence": np.repeat(np.arange(n), 4),
            "role": ["system", "user", "assistant", "assistant"] * n,
            "author": "",
            "channel": ["", "", "analysis", "final"] * n,
            "recipient": "",
            "content_type": "",
            "start": starts.ravel(),
            "content": starts.ravel() + 3,
            "stop": ends.ravel() - 1,
            "end": ends.ravel(),
            "closed_by": "end",
            "flags": "",
        }
    )
    return {"sequences": sequences, "messages": messages}


def _choices(rng: np.random.Generator, layers: int, experts: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return experts and gates [content or final, layer, choice, slot] to draw from: weighted, without repetition."""
    load = np.log(rng.dirichlet(np.full(experts, 0.8), layers))
    tilt = np.array([0, 0.5])[:, None, None, None] * (np.arange(experts) % 3 == 0)
    keys = load[None, :, None] + tilt + rng.gumbel(size=(2, layers, CHOICES, experts))
    gates = -np.sort(-rng.dirichlet(np.ones(k), (2, layers, CHOICES)))
    return np.argpartition(keys, -k, axis=-1)[..., -k:].astype(np.uint8), gates.astype(np.float16)


def _unit(
    layout: Layout, unit: Unit, choices: tuple[np.ndarray, np.ndarray], rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    lengths = np.array([layout.lengths[s] for s in unit.sequences])
    n, layers = int(lengths.sum()), choices[0].shape[1]
    position = np.concatenate([np.arange(m, dtype=np.int32) for m in lengths])
    share = position / np.repeat(lengths, lengths)
    message = np.digitize(share, [1 / 8, 1 / 5, 7 / 8])
    of_channel = np.array([CHANNELS.index(c) for c in ("prompt", "prompt", "analysis", "final")])
    tokens = {
        "id": rng.integers(0, 200_000, n, dtype=np.int32),
        "sequence": np.repeat(np.array(unit.sequences, np.int32), lengths),
        "position": position,
        "message": message.astype(np.int32),
        "part": np.full(n, PARTS.index("content"), np.uint8),
        "role": np.array([0, 1, 2, 2], np.int8)[message],
        "channel": of_channel[message].astype(np.uint8),
        "is_prompt": message < 2,
    }
    which = rng.integers(0, CHOICES, (layers, n))
    final, layer = (message == 3).astype(int)[None], np.arange(layers)[:, None]
    return tokens, {"experts": choices[0][final, layer, which], "gates": choices[1][final, layer, which]}


def ask(path: str, rounds: int) -> dict[str, Any]:
    """Return seconds to open the run and to answer what dashboards ask, each on a run opened anew; medians."""
    run = open_run(path)
    one = int(run.sequences.index[len(run.sequences) // 2])
    questions: dict[str, Callable[[Run], Any]] = {
        "open": lambda run: run.progress,
        "tables": lambda run: (run.sequences, run.messages),
        **{f"total {name}": lambda run, name=name: run.total(name) for name in run.summaries},  # type: ignore[misc]
        "one conversation, all layers": lambda run: run.sequence(one)[["experts", "gates", "channel"]].compute(),
    }
    rows = []
    for what, question in questions.items():
        seconds = []
        for _ in range(rounds):
            fresh = open_run(path)
            if what != "open":
                _ = fresh.sequences, fresh.layout  # asked once a session; a row of its own
            if what == "tables":
                fresh = open_run(path)
            begun = time.perf_counter()
            question(open_run(path) if what == "open" else fresh)
            seconds.append(time.perf_counter() - begun)
        rows.append({"question": what, "seconds": statistics.median(seconds)})
    n = int(run.sequences["length"].sum())
    size = sum(p.stat().st_size for p in Path(path).rglob("*") if p.is_file()) if Path(path).is_dir() else None
    heading = f"{path}: {count_of(n, 'token')}, {count_of(len(run.sequences), 'sequence')}" + (
        f", {size / 1e9:.2f} GB" if size else ""
    )
    show(heading, ("question", "ms"), [(str(r["question"]), f"{float(r['seconds']) * 1e3:,.0f}") for r in rows])  # type: ignore[arg-type]
    return {"tokens": n, "sequences": len(run.sequences), "bytes": size, "rounds": rounds, "questions": rows}
