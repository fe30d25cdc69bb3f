"""A selection of a run for other programs: Parquet, safetensors, or a Hugging Face dataset.

Unit by unit, so that memory does not depend on the run; in a temporary folder, renamed when it is complete.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS, PARTS, ROLES
from workbench.outputs import staged
from workbench.runs import shards
from workbench.runs.reader import Run

FORMATS = ("parquet", "safetensors", "datasets")
_COLUMNS = ("id", "sequence", "position", "message", "part", "role", "channel", "is_prompt", "logprob", "entropy")
_NAMES = {"channel": CHANNELS, "role": ROLES, "part": PARTS}


@dataclass(frozen=True)
class Selection:
    """Which tokens, by the names of their labels; empty: all."""

    channel: tuple[str, ...] = ()
    role: tuple[str, ...] = ()
    part: tuple[str, ...] = ()
    effort: tuple[str, ...] = ()
    task: tuple[str, ...] = ()

    def check(self, run: Run) -> None:
        """Check that every name of the selection occurs in the run.

        Raises:
            InputError: a name is unknown.
        """
        table = run.sequences
        known = {**_NAMES, **{c: tuple(sorted(set(table[c]))) for c in ("effort", "task")}}
        for what, names in known.items():
            if unknown := set(getattr(self, what)) - set(names):
                raise InputError(f"--{what} {min(unknown)}: choose from {', '.join(map(str, names))}")

    def of(self, columns: pd.DataFrame, sequences: pd.DataFrame) -> np.ndarray:
        """Return whether each token of these columns [token] is selected."""
        chosen = np.ones(len(columns), dtype=bool)
        for what, known in _NAMES.items():
            if names := getattr(self, what):
                chosen &= np.isin(columns[what], [known.index(name) for name in names])
        for what in ("effort", "task"):
            if names := getattr(self, what):
                of_sequence = sequences[what].isin(names)
                chosen &= of_sequence.reindex(columns["sequence"]).to_numpy()
        return chosen


def export(
    run: Run,
    out: str | Path,
    *,
    format: str,
    what: str = "tokens",
    layers: Sequence[int] = (),
    context: int = 128,
    selection: Selection | None = None,
    overwrite: bool = False,
) -> int:
    """Write the tokens or activations of a selection to `out`, and return the number of tokens.

    what: "tokens", with routing, or a recorded activation as "activations/resid_post". parquet: one row for each token.
    safetensors: activations [token, d] of each layer, in bfloat16 as recorded, and tokens.parquet with their rows.
    datasets: what SAELens reads, a row for each `context` consecutive tokens of a sequence.

    Raises:
        InputError: the format does not fit the quantity, or no token is selected.
    """
    out, selection = Path(out), selection or Selection()
    if format not in FORMATS:
        raise InputError(f"--format {format}: choose from {', '.join(FORMATS)}")
    hook, chosen = _what(run, what, layers)
    if hook is not None and format == "parquet":
        raise InputError("activations go to safetensors or datasets: Parquet has no bfloat16")
    if hook is None and format == "safetensors":
        raise InputError("--format safetensors is for activations: name one, as in --what activations/resid_post")
    if context < 1:
        raise InputError(f"--context {context}: expected at least 1 token")
    selection.check(run)
    writers: dict[str, Callable[[Path], int]] = {
        "parquet": lambda part: _parquet(run, part, selection),
        "safetensors": lambda part: _safetensors(run, part, selection, str(hook), chosen),
        "datasets": lambda part: _dataset(run, part, selection, hook, chosen, context),
    }
    with staged(out, command="export", inputs=[run.path], overwrite=overwrite) as part:
        n = writers[format](part)
        if not n:
            raise InputError("no token of this run matches the selection: choose other labels")
    return n


def _what(run: Run, what: str, layers: Sequence[int]) -> tuple[str | None, tuple[int, ...]]:
    if what == "tokens":
        return None, ()
    short = {a.hook.replace("hook_", ""): a for a in run.spec.activations if a.reduce != "moments"}
    name = what.removeprefix("activations/").replace("hook_", "")
    if name not in short:
        raise InputError(f"--what {what}: the run holds tokens{''.join(f', activations/{n}' for n in short)}")
    recorded = short[name].layers
    if missing := set(layers) - set(recorded):
        raise InputError(f"--layers {min(missing)}: {name} was recorded in {', '.join(map(str, recorded))}")
    return short[name].hook, tuple(layers) or recorded


def _blocks(run: Run, selection: Selection) -> Iterator[tuple[slice, np.ndarray, pd.DataFrame]]:
    """Yield rows of every committed unit in the store, which of them are selected, and the columns of those."""
    sequences = run.sequences
    for rows in run.spans:
        group = run.group["tokens"]
        columns = pd.DataFrame({name: np.asarray(group[name][rows]) for name in _COLUMNS})
        chosen = selection.of(columns, sequences)
        if chosen.any():
            yield rows, chosen, columns[chosen]


def _with_names(columns: pd.DataFrame, sequences: pd.DataFrame) -> pd.DataFrame:
    """Labels by name, and what is known of the sequence."""
    renamed = columns.rename(columns={"id": "token"})
    for what, names in _NAMES.items():
        renamed[what] = pd.Categorical.from_codes(columns[what].to_numpy(np.int64), pd.Index(names))
    about = sequences.loc[columns["sequence"]]
    known = {"sequence_id": "id", "prompt_id": "prompt_id", "effort": "effort", "task": "task"}
    return renamed.assign(**{name: about[column].to_numpy() for name, column in known.items()})


def _parquet(run: Run, part: Path, selection: Selection) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer, n = None, 0
    try:
        for rows, chosen, columns in _blocks(run, selection):
            table = pa.Table.from_pandas(_with_names(columns, run.sequences), preserve_index=False)
            if run.spec.routing:
                for name in ("experts", "gates"):
                    array = run.group[f"routing/{name}"]
                    shard = shards.read(array, run.checked, f"routing/{name}", rows.start, _end(array, rows), 1)
                    values = shard[:, : rows.stop - rows.start][:, chosen].swapaxes(0, 1)
                    table = table.append_column(name, _lists(values))
            writer = writer or pq.ParquetWriter(part, table.schema, compression="zstd")
            writer.write_table(table)
            n += len(columns)
    finally:
        if writer is not None:
            writer.close()
    return n


def _end(array: Any, rows: slice) -> int:
    """Return where the last shard of these rows ends."""
    grain = (array.shards or array.chunks)[1]
    return -(-rows.stop // grain) * grain


def _lists(values: np.ndarray) -> Any:
    """[token, layer, slot] as a column of lists of lists."""
    import pyarrow as pa

    tokens, layers, slots = values.shape
    inner = pa.ListArray.from_arrays(
        pa.array(np.arange(0, tokens * layers * slots + 1, slots, dtype=np.int32)), pa.array(values.ravel())
    )
    return pa.ListArray.from_arrays(pa.array(np.arange(0, tokens * layers + 1, layers, dtype=np.int32)), inner)


def _activations(run: Run, hook: str, layer: int, rows: slice, chosen: np.ndarray) -> np.ndarray:
    """bfloat16's bits [token, d]; tokens of a sparse recording that have none are left out by the caller."""
    recorded = next(a for a in run.spec.activations if a.hook == hook).layers
    return np.asarray(run.group[f"activations/{hook}"][recorded.index(layer), rows])[chosen]


def _with_values(run: Run, hook: str, selection: Selection) -> Iterator[tuple[slice, np.ndarray, pd.DataFrame]]:
    sparse = next(a for a in run.spec.activations if a.hook == hook).sparse
    for rows, chosen, columns in _blocks(run, selection):
        there = np.asarray(run.group[f"selected/{hook}"][rows]) if sparse else np.ones(len(chosen), bool)
        if (both := chosen & there).any():
            yield rows, both, columns[there[chosen]]


def _safetensors(run: Run, part: Path, selection: Selection, hook: str, layers: tuple[int, ...]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from safetensors import TensorSpec, serialize_file

    part.mkdir()
    files: list[dict[str, Any]] = []
    n, writer = 0, None
    try:
        for number, (rows, chosen, columns) in enumerate(_with_values(run, hook, selection)):
            name = f"activations-{number:05d}.safetensors"
            tensors: dict[str, TensorSpec] = {}
            written_parts: list[np.ndarray] = []  # the specifications only point at them
            for layer in layers:
                bits = np.ascontiguousarray(_activations(run, hook, layer, rows, chosen))
                tensors[f"blocks.{layer}.{hook}"] = TensorSpec(
                    dtype="bfloat16", shape=list(bits.shape), data_ptr=bits.ctypes.data, data_len=bits.nbytes
                )
                written_parts.append(bits)
            serialize_file(tensors, part / name, {"run": run.digest})
            table = pa.Table.from_pandas(_with_names(columns, run.sequences), preserve_index=False)
            writer = writer or pq.ParquetWriter(part / "tokens.parquet", table.schema, compression="zstd")
            writer.write_table(table)
            files.append({"file": name, "first_row": n, "rows": len(columns)})
            n += len(columns)
    finally:
        if writer is not None:
            writer.close()
    about = {"run": run.path, "digest": run.digest, "hook": hook, "layers": list(layers), "rows": n, "files": files}
    (part / "index.json").write_text(json.dumps(about, indent=1) + "\n")
    return n


def _dataset(
    run: Run, part: Path, selection: Selection, hook: str | None, layers: tuple[int, ...], context: int
) -> int:
    import datasets

    names = [f"blocks.{layer}.{hook}" for layer in layers]
    width = next((a.d for a in run.spec.activations if a.hook == hook), 0)
    ids = datasets.Sequence(datasets.Value("int32"), length=context if hook else -1)
    features: dict[str, Any] = {n: datasets.Array2D((context, width), "float32") for n in names} | {"token_ids": ids}
    if hook is None:
        features |= {c: datasets.Value("string") for c in ("sequence_id", "prompt_id", "effort", "task")}

    def rows() -> Iterator[dict[str, Any]]:
        if hook is None:
            table = run.sequences
            for _, _, columns in _blocks(run, selection):
                for sequence, own in columns.groupby("sequence", sort=False):
                    known = table.loc[sequence]
                    about = {c: str(known[c]) for c in ("prompt_id", "effort", "task")}
                    yield {"token_ids": own["id"].to_numpy(), "sequence_id": str(known["id"]), **about}
            return
        from workbench.runs.summaries import float32_of

        for span, chosen, columns in _with_values(run, hook, selection):
            values = [float32_of(_activations(run, hook, layer, span, chosen)) for layer in layers]
            of, tokens = columns["sequence"].to_numpy(), columns["id"].to_numpy()
            for one in np.split(np.arange(len(of)), np.flatnonzero(np.diff(of)) + 1):
                for start in range(0, len(one) - context + 1, context):
                    at = one[start : start + context]
                    yield {n: v[at] for n, v in zip(names, values, strict=True)} | {"token_ids": tokens[at]}

    cache = part.with_name(f"{part.name}.cache")
    n = 0
    try:
        made = datasets.Dataset.from_generator(
            rows, features=datasets.Features(features), cache_dir=str(cache), keep_in_memory=False
        )
        n = int(sum(map(len, made["token_ids"])))
        made.save_to_disk(str(part))
    except Exception as error:
        if n == 0 and "no data" in str(error):
            raise InputError(f"no sequence has {context} such tokens: choose a smaller --context") from error
        raise
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    return n
