"""The names of a tensor in the published layouts and its canonical name.

Canonical names are the parameter names of `workbench.model.transformer.GptOss`; only the checkpoint code uses others.
"""

from workbench.model.config import GROUP, Config

HUGGING_FACE = {
    "embed.weight": "model.embed_tokens.weight",
    "unembed.weight": "lm_head.weight",
    "ln_final.weight": "model.norm.weight",
    "ln1.weight": "input_layernorm.weight",
    "ln2.weight": "post_attention_layernorm.weight",
    **{f"attn.{p}.{kind}": f"self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")},
    "attn.sinks": "self_attn.sinks",
    "mlp.router.weight": "mlp.router.weight",
    "mlp.router.bias": "mlp.router.bias",
    "mlp.experts.gate_up.blocks": "mlp.experts.gate_up_proj_blocks",
    "mlp.experts.gate_up.scales": "mlp.experts.gate_up_proj_scales",
    "mlp.experts.gate_up.weight": "mlp.experts.gate_up_proj",
    "mlp.experts.gate_up.bias": "mlp.experts.gate_up_proj_bias",
    "mlp.experts.down.blocks": "mlp.experts.down_proj_blocks",
    "mlp.experts.down.scales": "mlp.experts.down_proj_scales",
    "mlp.experts.down.weight": "mlp.experts.down_proj",
    "mlp.experts.down.bias": "mlp.experts.down_proj_bias",
}
ORIGINAL = {
    "embed.weight": "embedding.weight",
    "unembed.weight": "unembedding.weight",
    "ln_final.weight": "norm.scale",
    "ln1.weight": "attn.norm.scale",
    "ln2.weight": "mlp.norm.scale",
    # one matrix in the file: its rows are q, k, v one after another
    **{f"attn.{p}.{kind}": f"attn.qkv.{kind}" for p in "qkv" for kind in ("weight", "bias")},
    **{f"attn.o.{kind}": f"attn.out.{kind}" for kind in ("weight", "bias")},
    "attn.sinks": "attn.sinks",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
    "mlp.experts.gate_up.blocks": "mlp.mlp1_weight.blocks",
    "mlp.experts.gate_up.scales": "mlp.mlp1_weight.scales",
    "mlp.experts.gate_up.bias": "mlp.mlp1_bias",
    "mlp.experts.down.blocks": "mlp.mlp2_weight.blocks",
    "mlp.experts.down.scales": "mlp.mlp2_weight.scales",
    "mlp.experts.down.bias": "mlp.mlp2_bias",
}
_TABLES = {"huggingface": (HUGGING_FACE, "model.layers."), "original": (ORIGINAL, "block.")}
LAYOUTS = tuple(_TABLES)


def name_in(layout: str, canonical: str) -> str:
    """Return the name of a tensor in the files of a layout."""
    table, prefix = _TABLES[layout]
    if not canonical.startswith("blocks."):
        return table[canonical]
    _, layer, rest = canonical.split(".", 2)
    return f"{prefix}{layer}.{table[rest]}"


def shapes(cfg: Config, experts: str) -> dict[str, tuple[int, ...]]:
    """Return canonical name → shape of every tensor of a model with "mxfp4" or "dense" experts."""
    layers = {
        f"blocks.{layer}.{name}": shape
        for layer in range(cfg.n_layers)
        for name, shape in _block_shapes(cfg, experts, cfg.experts_of(layer)).items()
    }
    ends = {"unembed.weight": (cfg.d_vocab, cfg.d_model), "ln_final.weight": (cfg.d_model,)}
    return {"embed.weight": (cfg.d_vocab, cfg.d_model)} | layers | ends


def _block_shapes(cfg: Config, experts: str, e: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer with `e` experts."""
    d, q = cfg.d_model, cfg.n_heads * cfg.d_head
    kv = cfg.n_key_value_heads * cfg.d_head
    block: dict[str, tuple[int, ...]] = {"ln1.weight": (d,)}
    for part, rows in (("q", q), ("k", kv), ("v", kv)):
        block |= {f"attn.{part}.weight": (rows, d), f"attn.{part}.bias": (rows,)}
    block |= {"attn.sinks": (cfg.n_heads,), "attn.o.weight": (d, q), "attn.o.bias": (d,), "ln2.weight": (d,)}
    block |= {"mlp.router.weight": (e, d), "mlp.router.bias": (e,)}
    for part, inputs, outputs in (("gate_up", d, 2 * cfg.d_mlp), ("down", cfg.d_mlp, d)):
        if experts == "dense":
            block[f"mlp.experts.{part}.weight"] = (e, inputs, outputs)
        else:
            block[f"mlp.experts.{part}.blocks"] = (e, outputs, inputs // GROUP, 16)
            block[f"mlp.experts.{part}.scales"] = (e, outputs, inputs // GROUP)
        block[f"mlp.experts.{part}.bias"] = (e, outputs)
    return block
