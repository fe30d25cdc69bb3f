"""Synthetic runs, written by the real writer from random numbers: no model, no torch."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import zarr

from workbench.capture.plan import plan_units
from workbench.harmony.labels import CHANNELS, PARTS
from workbench.runs.schema import Activation, Layout, Spec, Unit
from workbench.runs.summaries import summarise
from workbench.runs.writer import RunWriter, open_writer

MODEL = {"n_layers": 3, "num_experts": 8, "experts_per_token": 2, "n_heads": 4, "d_model": 32}
SPEC = Spec(
    routing=True, router_logits=True, sinks=True, logprobs=True, activations=(Activation("hook_resid_post", (0, 2), 5),)
)
LENGTHS = (700, 900, 20, 1500, 5, 1024, 3, 600)


def tables(lengths: tuple[int, ...]) -> dict[str, pd.DataFrame]:
    n = len(lengths)
    sequences = pd.DataFrame(
        {
            "id": [f"s{i}" for i in range(n)],
            "prompt_id": [f"p{i // 2} é" for i in range(n)],
            "effort": [("low", "high")[i % 2] for i in range(n)],
            "n_prompt": [2] * n,
            "correct": np.array([i % 3 - 1 for i in range(n)], dtype=np.int8),
            "answer": [""] * n,
            "meta": [json.dumps({"task": "t", "domain": "d"})] * n,
        }
    )
    messages = pd.DataFrame(
        {"sequence": range(n), "role": ["user"] * n, "start": [0] * n, "end": list(lengths), "flags": [""] * n}
    )
    return {"sequences": sequences, "messages": messages}


def job(layout: Layout, spec: Spec = SPEC, **changes: Any) -> dict[str, Any]:
    return {
        "layout": layout,
        **tables(layout.lengths),
        "model": MODEL,
        "checkpoint": {"digest": "abc", "name": "synthetic"},
        "spec": spec,
        "provenance": {"transcripts": {"digest": "def"}, "dtype": "float32"},
    } | changes


def unit_data(layout: Layout, unit: Unit, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Tokens and records of a unit, the same whenever they are asked for."""
    rng = np.random.default_rng(unit.index + 1000 * seed)
    lengths = [layout.lengths[s] for s in unit.sequences]
    n = sum(lengths)
    layers, experts, k = MODEL["n_layers"], MODEL["num_experts"], MODEL["experts_per_token"]
    logits = rng.normal(size=(layers, n, experts)).astype(np.float16)
    chosen = np.argsort(-logits, -1, kind="stable")[..., :k]
    top = np.take_along_axis(logits.astype(np.float64), chosen, -1)
    gates = np.exp(top) / np.exp(top).sum(-1, keepdims=True)
    logprob = -rng.random(n).astype(np.float32)
    logprob[np.cumsum([0, *lengths[:-1]])] = np.nan
    tokens = {
        "id": rng.integers(0, 100, n, dtype=np.int32),
        "sequence": np.repeat(np.array(unit.sequences, dtype=np.int32), lengths),
        "position": np.concatenate([np.arange(m, dtype=np.int32) for m in lengths]),
        "message": np.zeros(n, dtype=np.int32),
        "part": rng.integers(0, len(PARTS), n, dtype=np.uint8),
        "role": rng.integers(-1, 5, n, dtype=np.int8),
        "channel": rng.integers(0, len(CHANNELS), n, dtype=np.uint8),
        "is_prompt": np.zeros(n, dtype=bool),
    }
    records = {
        "experts": chosen.astype(np.uint8),
        "gates": gates.astype(np.float16),
        "router_logits": logits,
        "sink": rng.random((layers, n, MODEL["n_heads"])).astype(np.float16),
        "logprob": logprob,
        "entropy": np.where(np.isnan(logprob), np.nan, 1).astype(np.float32),
        "activations/hook_resid_post": (rng.normal(size=(2, n, 5)).astype(np.float32).view(np.uint32) >> 16).astype(
            np.uint16
        ),
    }
    return tokens, records


def write_unit(writer: RunWriter, index: int, seed: int = 0) -> None:
    tokens, records = unit_data(writer.layout, writer.layout.units[index], seed)
    sums = summarise(records, tokens["sequence"], tokens["channel"], num_experts=MODEL["num_experts"])
    writer.write_unit(index, tokens, records, sums)


def write_run(
    path: Path, *, units: list[int] | None = None, lengths: tuple[int, ...] = LENGTHS, seed: int = 0
) -> Layout:
    """A run with some of its units (default: all, and finished)."""
    layout = plan_units(lengths, 1024)
    with open_writer(path, **job(layout)) as writer:
        for index in writer.pending() if units is None else units:
            write_unit(writer, index, seed)
        if units is None:
            writer.finish()
    return layout


def make_older(path: Path) -> Path:
    """The run as schema 2 has it, without manifests: its values can only be checked against each other."""
    shutil.rmtree(path / "manifest")
    attributes = zarr.open_group(str(path)).attrs
    attributes["schema"] = 2
    del attributes["digest"]
    return path


@pytest.fixture(scope="session")
def written_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, written once; read only, as every test gets a copy of its own as `run_path`."""
    path = tmp_path_factory.mktemp("written") / "run.zarr"
    write_run(path)
    return path


@pytest.fixture
def run_path(written_run: Path, tmp_path: Path) -> Path:
    """A finished run that the test may change."""
    shutil.copytree(written_run, tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


Write = Callable[..., Layout]
