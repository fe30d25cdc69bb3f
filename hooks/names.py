"""The name and shape of every hook point, for the model, the capture job and `workbench info`.

Torch-free: the reading wing uses it to explain what a run holds. TransformerLens' names where it has them.
Axes: batch, pos, head, kv (key-value head), d_head, slot (of the experts a token went to), expert, query_pos, key_pos.
"""

BLOCK = {
    "hook_resid_pre": "batch pos d_model",
    "ln1.hook_scale": "batch pos 1",
    "ln1.hook_normalized": "batch pos d_model",
    "attn.hook_q": "batch pos head d_head",
    "attn.hook_k": "batch pos kv d_head",
    "attn.hook_v": "batch pos kv d_head",
    "attn.hook_rot_q": "batch pos head d_head",
    "attn.hook_rot_k": "batch pos kv d_head",
    "attn.hook_attn_scores": "batch head query_pos key_pos",
    "attn.hook_sink": "batch pos head",
    "attn.hook_pattern": "batch head query_pos key_pos",
    "attn.hook_z": "batch pos head d_head",
    "attn.hook_result": "batch pos head d_model",
    "hook_attn_out": "batch pos d_model",
    "hook_resid_mid": "batch pos d_model",
    "ln2.hook_scale": "batch pos 1",
    "ln2.hook_normalized": "batch pos d_model",
    "mlp.router.hook_out": "batch pos expert",
    "mlp.hook_expert_indices": "batch pos slot",
    "mlp.hook_expert_weights": "batch pos slot",
    "mlp.experts.hook_gate": "batch pos slot d_mlp",
    "mlp.experts.hook_pre": "batch pos slot d_mlp",
    "mlp.experts.hook_post": "batch pos slot d_mlp",
    "mlp.experts.hook_out": "batch pos slot d_model",
    "hook_mlp_out": "batch pos d_model",
    "hook_resid_post": "batch pos d_model",
}
FIRST = {"hook_embed": "batch pos d_model"}
LAST = {
    "ln_final.hook_scale": "batch pos 1",
    "ln_final.hook_normalized": "batch pos d_model",
    "unembed.hook_out": "batch pos d_vocab",
}


def hook_points(n_layers: int) -> dict[str, str]:
    """Name → axes of every hook point, in the order in which a forward pass reaches them."""
    blocks = {f"blocks.{layer}.{name}": axes for layer in range(n_layers) for name, axes in BLOCK.items()}
    return FIRST | blocks | LAST
