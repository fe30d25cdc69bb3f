"""How fast a unit is written, compared with zarr-python's defaults on the same data.

A unit of gpt-oss-20b's width: residual streams of some layers, and routing and sinks of all. One baseline writes the
same arrays with our chunks and shards by `array[:] = values`, with zarr-python's default codecs and pipeline; the other
also uses its default chunks. The three take turns, and the medians are reported.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from workbench.bench.table import show
from workbench.runs import shards
from workbench.runs.schema import CHUNK
from workbench.runs.storage import LocalStorage

TOKENS, WIDTH, LAYERS = 16_384, 2880, 24


def run(streams: int, rounds: int) -> dict[str, Any]:
    """Return bytes per second and the size on disk of each way to write."""
    rng = np.random.default_rng(0)
    bits = (rng.standard_normal((streams, TOKENS, WIDTH), dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    data: dict[str, np.ndarray] = {
        "residual streams": bits,
        "experts": rng.integers(0, 32, (LAYERS, TOKENS, 4), dtype=np.uint8),
        "gates": np.sort(rng.dirichlet(np.ones(4), (LAYERS, TOKENS)), -1).astype(np.float16),
        "sinks": rng.random((LAYERS, TOKENS, 64)).astype(np.float16),
    }
    size = sum(values.nbytes for values in data.values())
    ways: dict[str, Callable[[Path, np.ndarray], None]] = {
        "workbench": _workbench,
        "zarr, same shards": _zarr_same_shards,
        "zarr, its own chunks": _zarr_default,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    stored: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds + 1):  # the first one warms up
            for name, way in ways.items():
                path = Path(folder) / "run"
                begun = time.perf_counter()
                for what, values in data.items():
                    way(path / what, values)
                if turn:
                    seconds[name].append(time.perf_counter() - begun)
                stored[name] = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
                shutil.rmtree(path)
    rows: list[dict[str, Any]] = [
        {
            "way": name,
            "seconds": (s := statistics.median(times)),
            "bytes_per_s": size / s,
            "stored": stored[name] / size,
        }
        for name, times in seconds.items()
    ]
    base = rows[0]["bytes_per_s"]
    result = {"bytes": size, "threads": shards.threads(), "rounds": rounds, "zarr": zarr.__version__, "ways": rows}
    show(
        f"Writing {size / 1e6:,.0f} MB, {shards.threads()} threads, medians of {rounds}",
        ("way", "MB/s", "ours is", "on disk"),
        [
            (str(r["way"]), f"{r['bytes_per_s'] / 1e6:,.0f}", f"{base / r['bytes_per_s']:.2f} ×", f"{r['stored']:.0%}")
            for r in rows
        ],
    )
    return result


def _chunks_and_shards(values: np.ndarray) -> dict[str, Any]:
    return {"chunks": (1, CHUNK, values.shape[2]), "shards": (1, TOKENS, values.shape[2])}


def _workbench(path: Path, values: np.ndarray) -> None:
    array = zarr.create_array(
        str(path), shape=values.shape, dtype=values.dtype, compressors=shards.CODEC, **_chunks_and_shards(values)
    )
    shards.write(shards.writes(array, LocalStorage(path), "", 0, 1, values))


def _zarr_same_shards(path: Path, values: np.ndarray) -> None:
    zarr.create_array(str(path), shape=values.shape, dtype=values.dtype, **_chunks_and_shards(values))[:] = values


def _zarr_default(path: Path, values: np.ndarray) -> None:
    zarr.create_array(str(path), shape=values.shape, dtype=values.dtype)[:] = values
