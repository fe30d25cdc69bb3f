"""Describe a model and its memory from its config alone."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from workbench import harmony
from workbench.counting import count_of
from workbench.harmony.vocabulary import Tokenizer
from workbench.hooks.names import BLOCK, FIRST, LAST
from workbench.kernels import cpu
from workbench.model import memory
from workbench.model.checkpoint import open_checkpoint, resolve
from workbench.model.config import PUBLISHED, Config
from workbench.model.memory import human


@dataclass(frozen=True)
class Subject:
    """What is described: a checkpoint, or a published shape without weights."""

    name: str
    cfg: Config
    experts: str
    notes: tuple[str, ...] = ()
    tokenizer: Callable[[], Tokenizer] = harmony.tokenizer


@dataclass(frozen=True)
class Plan:
    """What to plan for. recorded: hook point → dtype in the store; other fields are those of the capture job."""

    tokens: int
    batch: int
    room: int
    recorded: Mapping[str, torch.dtype] = field(default_factory=dict)
    predictions: int = 0
    unit_tokens: int = 0
    dtype: torch.dtype = torch.bfloat16


def subject(source: str, ignore_fields: Collection[str] = ()) -> Subject:
    """Return a checkpoint as `load` finds it, or "20b" and "120b" if there is no such folder."""
    if source in PUBLISHED and not Path(source).exists():
        return Subject(f"the shape of gpt-oss-{source}", PUBLISHED[source], "mxfp4")
    checkpoint = open_checkpoint(resolve(source), ignore_fields=ignore_fields)
    notes = [*checkpoint.notes]
    for precision, names in checkpoint.tensors.other_precision().items():
        notes.append(
            f"{len(names)} tensors are stored as {precision}, not in the published precision: {_listed(names)}"
        )
    return Subject(
        f"{source} ({checkpoint.layout} layout)", checkpoint.cfg, checkpoint.experts, tuple(notes), checkpoint.tokenizer
    )


def _listed(names: Collection[str]) -> str:
    """Return names of tensors with each layer's alike in one, as in blocks.*.attn.q.weight."""
    return ", ".join(dict.fromkeys(re.sub(r"^blocks\.\d+", "blocks.*", name) for name in names))


def describe(about: Subject, plan: Plan) -> None:
    """Print the config, the memory plan and the hook points."""
    cfg, console = about.cfg, Console()
    table = Table("", "", title=f"{about.name}, {about.experts} experts", show_header=False)
    sizes = {"parameters": cfg.n_params, "parameters active per token": cfg.n_active_params}
    for name, value in {**cfg.to_json(), **sizes}.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    console.print(table)
    for note in about.notes:
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    title = f"Memory of a GPU, {str(plan.dtype).removeprefix('torch.')}: {plan.tokens:,} tokens, batch {plan.batch:,}"
    costs = Table("", "bytes", "", title=title)
    costs.columns[1].justify = "right"
    for name, size, note in costs_of(about, plan):
        costs.add_row(name, f"{size:,}", note)
    console.print(costs)
    for line in fitting(about, plan):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"Products of few rows on this CPU: {cpu.description()}.", highlight=False, soft_wrap=True)
    points = Table("hook point", "axes", "values per token", title="Hook points (block points once for each layer)")
    points.columns[0].no_wrap = True  # several names that are cut would look the same
    for name, axes in (FIRST | {f"blocks.{{l}}.{n}": a for n, a in BLOCK.items()} | LAST).items():
        points.add_row(name, axes, f"{memory.width(cfg, axes):,}" + (" × keys" if "key_pos" in axes else ""))
    console.print(points)


def costs_of(about: Subject, plan: Plan) -> Iterator[tuple[str, int, str]]:
    """Yield the parts of the memory: name, bytes, note."""
    cfg, parts = about.cfg, memory.weights(about.cfg, about.experts, plan.dtype)
    yield "weights", sum(parts.values()), ""
    yield "  embedding", parts["embed"], ""
    yield "  each layer", parts["blocks.0"], f"{cfg.n_layers} of them"
    yield "  unembedding and final norm", parts["unembed"], ""
    yield (
        "cache",
        plan.batch * plan.tokens * memory.cache(cfg, plan.dtype),
        f"{memory.cache(cfg, plan.dtype):,} a token at most; as layers with a window hold less, "
        f"{plan.batch * memory.cache_row(cfg, plan.tokens, plan.dtype):,} in all",
    )
    passed = capturing(cfg, plan, plan.tokens)
    yield "forward pass of a capture", max(passed.values()), ""
    for stage, size in passed.items():
        yield f"  {stage}", size, "the peak" if size == max(passed.values()) else ""
    prefill = generating(cfg, plan, plan.batch)
    yield (
        "forward pass of a generation",
        max(prefill.values()),
        f"{count_of(plan.batch, 'prompt')} of {plan.tokens:,} tokens",
    )
    yield "cuBLAS workspace", memory.CUBLAS_WORKSPACE, "once, on a GPU"
    token_bytes = memory.records(cfg, plan.recorded)
    yield (
        "records of a unit, on the host",
        2 * plan.unit_tokens * token_bytes,
        f"{token_bytes:,} a token, held twice when stacked",
    )


def capturing(cfg: Config, plan: Plan, tokens: int) -> dict[str, int]:
    """Return the memory stages of a capture's forward pass over `tokens`."""
    return memory.activations(
        cfg, tokens, dtype=plan.dtype, recorded=plan.recorded, predictions=min(tokens, plan.predictions)
    )


def generating(cfg: Config, plan: Plan, batch: int) -> dict[str, int]:
    """Return the memory stages of the longest forward pass of a generation, with all prompts of a batch at once."""
    return memory.activations(cfg, batch * plan.tokens, dtype=plan.dtype, logits=batch)


def fitting(about: Subject, plan: Plan) -> Iterator[str]:
    """Yield sentences about what fits into the available memory."""
    cfg, parts = about.cfg, memory.weights(about.cfg, about.experts, plan.dtype)
    total = sum(parts.values())
    fixed = total + memory.CUBLAS_WORKSPACE

    def captures(tokens: int) -> bool:
        return fixed + max(capturing(cfg, plan, tokens).values()) <= plan.room

    def generates(batch: int) -> bool:
        cache = batch * plan.tokens * memory.cache(cfg, plan.dtype)
        return fixed + cache + max(generating(cfg, plan, batch).values()) <= plan.room

    if total > plan.room:
        yield f"One device of {human(plan.room)} does not hold it: the weights alone are {human(total)}."
    else:
        longest = memory.largest(captures)
        context = f"; the context is {cfg.n_ctx:,}" if longest > cfg.n_ctx else ""
        yield f"One device of {human(plan.room)} holds the weights and {human(plan.room - total)} more:"
        yield f"  a capture with forward passes of up to {longest:,} tokens{context};"
        yield f"  a generation of up to {memory.largest(generates):,} rows of {plan.tokens:,} tokens, all prompt."
    passed = max(*capturing(cfg, plan, plan.tokens).values(), *generating(cfg, plan, plan.batch).values())
    layer = plan.batch * plan.tokens * memory.cache(cfg, plan.dtype) // cfg.n_layers
    cached = {part: size + layer * part.startswith("blocks.") for part, size in parts.items()}
    enough = memory.devices_for(cached, plan.room - passed - memory.CUBLAS_WORKSPACE)
    if enough is None:
        yield f"No number of devices of {human(plan.room)} does this plan: a layer and a forward pass are too much."
    else:
        held = ", ".join(human(size) for size in memory.stages(cached, enough))
        yield (
            f"This plan needs {count_of(enough, 'such device')}: {held} of weights and cache, "
            f"{human(passed)} of activations."
        )
