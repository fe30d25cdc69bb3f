"""What a model is and what it costs, read from its config alone."""

from rich.console import Console
from rich.table import Table

from workbench.hooks.names import BLOCK, FIRST, LAST
from workbench.model.checkpoint import open_checkpoint, resolve
from workbench.model.config import Config


def sizes(cfg: Config) -> dict[str, int]:
    """Parameters, and bytes of weights as stored (bfloat16, experts in MXFP4) and of the cache per token."""
    matrix = cfg.d_model * cfg.d_mlp * 3 * cfg.num_experts * cfg.n_layers
    return {
        "parameters": cfg.n_params,
        "parameters active per token": cfg.n_active_params,
        "bytes of expert matrices (MXFP4)": matrix * 17 // 32,
        "bytes of all other weights (bfloat16)": 2 * (cfg.n_params - matrix),
        "bytes of key-value cache per token": 2 * 2 * cfg.n_layers * cfg.n_key_value_heads * cfg.d_head,
    }


def describe(source: str) -> None:
    """Print the config, sizes and hook points of a checkpoint."""
    checkpoint = open_checkpoint(resolve(source))
    cfg, console = checkpoint.cfg, Console()
    table = Table(
        "", "", title=f"{source} ({checkpoint.layout} layout, {checkpoint.experts} experts)", show_header=False
    )
    for name, value in {**cfg.to_json(), **sizes(cfg)}.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    console.print(table)
    points = Table("hook point", "axes", "values per token", title="Hook points (block points once for each layer)")
    for name, axes in FIRST.items() | {f"blocks.{{l}}.{n}": a for n, a in BLOCK.items()}.items() | LAST.items():
        points.add_row(name, axes, _width(axes, cfg))
    console.print(points)


def _width(axes: str, cfg: Config) -> str:
    size = {
        "head": cfg.n_heads, "kv": cfg.n_key_value_heads, "slot": cfg.experts_per_token, "expert": cfg.num_experts,
        "d_head": cfg.d_head, "d_model": cfg.d_model, "d_mlp": cfg.d_mlp, "d_vocab": cfg.d_vocab, "1": 1,
    }  # fmt: skip
    total = 1
    for axis in axes.split():
        total *= size.get(axis, 1)
    return f"{total:,}" + (" × keys" if "key_pos" in axes else "")
