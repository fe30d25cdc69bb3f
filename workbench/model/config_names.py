"""The attributes that users and tools of TransformerLens expect of a config, beside its own fields.

Reference: TransformerLens 4.3, config/transformer_lens_config.py, for names and meanings.
"""

from typing import Any, ClassVar


class ConfigNames:
    """Constants of gpt-oss under TransformerLens' names, and what `model.cfg` has of its model."""

    d_head: int
    d_vocab: int
    windows: tuple[int | None, ...]
    rope: Any

    attn_only: ClassVar[bool] = False
    use_attn_result: ClassVar[bool] = False  # attn.hook_result is there when it is hooked
    normalization_type: ClassVar[str] = "RMS"
    final_rms: ClassVar[bool] = True
    positional_embedding_type: ClassVar[str] = "rotary"
    attention_dir: ClassVar[str] = "causal"
    act_fn: ClassVar[str] = "swiglu"
    gated_mlp: ClassVar[bool] = True
    parallel_attn_mlp: ClassVar[bool] = False
    use_attn_scale: ClassVar[bool] = True
    scale_attn_by_inverse_layer_idx: ClassVar[bool] = False
    use_normalization_before_and_after: ClassVar[bool] = False
    attn_scores_soft_cap: ClassVar[float] = -1.0  # TransformerLens' value for none
    output_logits_soft_cap: ClassVar[float] = -1.0
    default_prepend_bos: ClassVar[bool] = False  # harmony has no token that begins a text
    tokenizer_prepends_bos: ClassVar[bool] = False
    tie_word_embeddings: ClassVar[bool] = False
    use_hook_tokens: ClassVar[bool] = False
    load_in_4bit: ClassVar[bool] = False
    init_weights: ClassVar[bool] = False
    original_architecture: ClassVar[str] = "GptOssForCausalLM"
    seed: ClassVar[int | None] = None

    def to_json(self) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def _its_model(self) -> Any:
        if "_model" not in self.__dict__:
            raise AttributeError("a config alone has no device and no dtype: ask a model's, model.cfg")
        return self.__dict__["_model"]

    device = property(lambda self: self._its_model.device, doc="The device of the model's embedding.")
    dtype = property(lambda self: self._its_model.dtype, doc="The dtype of the model's residual stream.")
    n_devices = property(lambda self: len(set(self._its_model.devices)), doc="Number of devices the layers are on.")
    model_name = property(lambda self: str(self._its_model.checkpoint.path.name), doc="Name of the checkpoint.")
    tokenizer_name = property(lambda self: str(self._its_model.tokenizer.name), doc="Name of the model's tokenizer.")
    default_padding_side = property(
        lambda self: str(self._its_model.tokenizer.padding_side), doc="Where shorter texts of a list are padded."
    )
    d_vocab_out = property(lambda self: self.d_vocab, doc="Number of logits: the vocabulary.")
    rotary_dim = property(lambda self: self.d_head, doc="Number of dimensions of a head that rotate: all.")
    rotary_base = property(lambda self: self.rope.theta, doc="Base of the rotary frequencies, before YaRN.")
    attn_scale = property(lambda self: self.d_head**0.5, doc="What attention scores are divided by.")
    use_local_attn = property(lambda self: any(self.windows), doc="Whether any layer attends to a window of keys only.")
    use_hook_mlp_in = property(lambda self: self._has("hook_mlp_in"), doc="See `model.set_use_hook_mlp_in`.")
    use_attn_in = property(lambda self: self._has("hook_attn_in"), doc="See `model.set_use_attn_in`.")
    use_split_qkv_input = property(lambda self: self._has("hook_q_input"), doc="See `model.set_use_split_qkv_input`.")

    @property
    def ungroup_grouped_query_attention(self) -> bool:
        """Return whether every query head has keys and values of its own at the hooks."""
        return bool(self._its_model.blocks[0].attn.ungrouped)

    @property
    def window_size(self) -> int | None:
        """Return the window of the layers that have one; see `windows` for each layer."""
        return next((window for window in self.windows if window is not None), None)

    @property
    def attn_types(self) -> list[str]:
        """Return the kind of attention of each layer, under TransformerLens' names."""
        return ["global" if window is None else "local" for window in self.windows]

    def is_layer_norm_activation(self) -> bool:
        """Return whether the activation contains a norm, as SoLU's does: never."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes and constants by name, as plain values."""
        return self.to_json()

    def _has(self, point: str) -> bool:
        return self._its_model.blocks[0].get_point(point) is not None
