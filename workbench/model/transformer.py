"""gpt-oss with a hook point at every step, as a HookedRootModule of TransformerLens.

A hook point costs nothing until it is hooked. One that the fast path has no tensor for (scores, patterns, per-head
results, the inside of the experts) is materialised only while it is hooked, in that layer; the numbers are the same
either way.

Reference: openai/gpt-oss, gpt_oss/torch/model.py (commit 7b58334); the OpenAI gpt-oss model card, arXiv 2508.10925.
"""

import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformer_lens.HookedRootModule import HookedRootModule
from transformer_lens.utilities.slice import Slice

from workbench.errors import InputError
from workbench.hooks.hook_points import CheckedHookPoint, snapshot_hooks
from workbench.hooks.names import closest_names, hook_points
from workbench.model import calling, input_points
from workbench.model.activation_cache import ActivationCache
from workbench.model.cache import KVCache
from workbench.model.calling import ReturnType
from workbench.model.config import Config
from workbench.model.generate import generate, generate_stream, with_options_of
from workbench.model.generation_loop import GenerationStep
from workbench.model.layers import ELSEWHERE, Block, Embed, RMSNorm, Unembed
from workbench.model.pass_context import PassContext
from workbench.model.rope import inverse_frequencies
from workbench.model.text import TextMethods
from workbench.model.weights import ModelWeights

# TransformerLens 4 has the inputs of attention under both names
_INPUT_OF_ATTENTION = re.compile(r"(blocks\.\d+)\.attn\.(hook_[qkv]_input|hook_attn_in)")
_UNPROCESSED = "weights stay as published, nothing is folded or centred; gains are block.ln1.w, block.ln2.w, ln_final.w"
_NOT_OFFERED = dict.fromkeys(
    ("process_weights_", "process_weights", "enable_compatibility_mode", "fold_layer_norm", "center_writing_weights"),
    _UNPROCESSED,
) | {
    "original_model": "it wraps no other model; model.checkpoint is the checkpoint that it was loaded from",
    "input_to_embed": "use model.embed(model.to_tokens(text)), and model(stream, start_at_layer=0) for the rest",
    "block_hooks": "model.hook_dict has the names of all hook points",
    "block_submodules": "model.blocks[0].named_children() has the parts of a block",
    "layer_types": "all layers have attention and experts; model.cfg.attn_types has the kinds of attention",
    "stack_params_for": "model.W_Q and its like are stacked already, model.blocks_with(name) has the blocks",
    "hf_generate": "use model.generate",
}


class GptOss(TextMethods, ModelWeights, HookedRootModule):
    """The model. `GptOss(cfg)` has dense, trainable float32 experts; `load` gives one on a checkpoint's weights."""

    def __init__(self, cfg: Config, *, packed: bool = False, tokenizer: Any = None, checkpoint: Any = None) -> None:
        super().__init__()
        self.cfg, self.tokenizer, self.checkpoint = cfg.of(self), tokenizer, checkpoint
        self.adapter: Any = None  # see workbench.model.lora
        self.context: PassContext | None = None  # of the last pass; hooks read it
        self._rotation: Tensor | None = None
        # Whether unhooked steps of `generate` are recorded as CUDA graphs, on a GPU: see workbench.model.decode_graph.
        self.cuda_graphs = torch.version.hip is None
        self.checkpointing = False  # keep one stream a block for the backward pass and compute the rest again
        self.embed = Embed(cfg.d_vocab, cfg.d_model)
        self.hook_embed = CheckedHookPoint()
        self.blocks = nn.ModuleList(Block(cfg, layer, packed) for layer in range(cfg.n_layers))
        self.ln_final = RMSNorm(cfg.d_model, cfg.eps)
        self.unembed = Unembed(cfg)
        self.setup()

    @torch.no_grad()
    def reset_parameters(self, seed: int = 0) -> "GptOss":
        """Draw random weights to train from: matrices ~ N(0, 1/inputs), embedding N(0, 0.5), vectors as constructed."""
        rng = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() > 1 and not name.endswith("bias"):
                inputs = p.shape[1]
                p.normal_(0, 0.5 if name == "embed.weight" else inputs**-0.5, generator=rng)
            elif name.endswith("bias"):
                p.zero_()
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the residual stream."""
        return self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        """Return the device of the embedding, and of the complete model unless it is spread over several `devices`."""
        return self.embed.weight.device

    @property
    def devices(self) -> list[torch.device]:
        """Return the device of each layer, of its cache and of its hooks; logits are on the last."""
        return [block.get_parameter("ln1.weight").device for block in self.blocks]

    def _frequencies(self) -> Float[Tensor, " half"]:
        """Return the frequencies of the rotation on the model's device, to which they are copied once."""
        if self._rotation is None or self._rotation.device != self.device:
            self._rotation = inverse_frequencies(self.cfg.rope, self.cfg.d_head).to(self.device)
        return self._rotation

    def residual(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        cache: KVCache | None = None,
        packed: Sequence[int] | None = None,
        n_real: Sequence[int] | None = None,
        layers: range | None = None,
        stream: Float[Tensor, "batch pos d_model"] | None = None,
        hook_columns: Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream after the last block, before the final norm; arguments as `forward` has them.

        layers: only these blocks. stream: what enters the first of them, in place of the embedding. hook_columns: the
        column of this pass that each column of the tensors which hooks see comes from, where it is another.
        """
        tokens = tokens.to(self.device)  # ids from anywhere: `device="auto"` may have put the model on a GPU
        where = PassContext(self.cfg, tokens, cache, packed, n_real, self._frequencies())
        self.context = where if hook_columns is None else where.at(hook_columns)
        x = self.embed(tokens) if stream is None else stream.to(self.dtype)
        if torch.is_grad_enabled() and not x.requires_grad and self._has_backward_hooks():
            x = x.detach().requires_grad_()  # gradients of activations do not need those of weights
        x = self.hook_embed(x) if stream is None else x
        chosen = range(self.cfg.n_layers) if layers is None else layers
        for block, device in [
            pair for i, pair in enumerate(zip(self.blocks, self.devices, strict=True)) if i in chosen
        ]:
            x, where = x.to(device), where.to(device)
            with torch.cuda.device_of(x):  # Triton launches on the current device; nothing off GPUs
                if self.checkpointing and cache is None and torch.is_grad_enabled():
                    x = self._checkpointed(block, x, where)
                else:
                    x = block(x, where)
        if cache is not None:
            cache.advance()
        return x.to(self.unembed.weight.device)

    def _has_backward_hooks(self) -> bool:
        return any(point.bwd_hooks for point in self.hook_dict.values())

    def _checkpointed(self, block: nn.Module, x: Tensor, where: PassContext) -> Tensor:
        """Return the block's output; the backward pass computes it again with the hooks and the tokens of this pass."""
        hooks, context = snapshot_hooks(block), self.context
        assert context is not None

        @contextmanager
        def again() -> Iterator[None]:
            with self.within(context), hooks():
                yield

        return checkpoint(block, x, where, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))

    def logits(
        self, residual: Float[Tensor, "batch pos d_model"], columns: Int[Tensor, "batch kept"]
    ) -> Float[Tensor, "batch kept d_vocab"]:
        """Return logits from what `residual` returned, of these columns of every row only."""
        assert self.context is not None, "logits come after residual"
        selected = residual.gather(1, columns[..., None].to(residual.device).expand(-1, -1, residual.shape[-1]))
        with self.within(self.context.at(columns)):
            return self.unembed(self.ln_final(selected))

    @contextmanager
    def within(self, context: PassContext | None) -> Iterator[None]:
        """Replace, within the context, the pass context that hooks see."""
        before, self.context = self.context, context
        try:
            yield
        finally:
            self.context = before

    def forward(
        self,
        input: Any,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        start_at_layer: int | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Any = None,
        stop_at_layer: int | None = None,
        past_kv_cache: KVCache | None = None,
        *,
        cache: KVCache | None = None,
        packed: Sequence[int] | None = None,
        n_real: Sequence[int] | None = None,
    ) -> Any:
        """Return the logits [batch pos d_vocab] of text, a list of texts, or ids in any container.

        return_type: "logits", "loss" (the mean cross-entropy in nats; of every token with `loss_per_token`), "both",
        or None. Ids are moved to the model's device. Rows of unequal length are padded; `attention_mask` or
        `padding_side` state where a tensor has padding, on either side. prepend_bos: True puts `<|startoftext|>` before
        a text; harmony has no such token, so None and False add nothing.

        start_at_layer: `input` is a residual stream [batch pos d_model] that enters this layer; `tokens` are then its
        ids. stop_at_layer: return the residual stream that would enter this layer.

        With `cache` (or `past_kv_cache`) the tokens continue what it holds, and are added to it. With `packed` the
        single row holds several sequences end to end, of these lengths, which do not see each other. `n_real` gives
        hooks how many tokens of each row are not padding on the right, which changes no result; a cache keeps these.

        Raises:
            InputError: the input is neither text nor ids of the vocabulary, or an option has no meaning.
        """
        if cache is not None and past_kv_cache is not None:
            raise InputError("cache and past_kv_cache are two names of one option: pass one of them")
        return calling.forward(
            self,
            input,
            return_type,
            loss_per_token=loss_per_token,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            start_at_layer=start_at_layer,
            tokens=tokens,
            attention_mask=attention_mask,
            stop_at_layer=stop_at_layer,
            cache=past_kv_cache if cache is None else cache,
            packed=packed,
            n_real=n_real,
        )

    def loss_fn(
        self, logits: Tensor, tokens: Tensor, attention_mask: Tensor | None = None, per_token: bool = False
    ) -> Tensor:
        """Return the cross-entropy in nats of tokens [batch pos] under logits [batch pos d_vocab]."""
        return calling.loss_fn(logits, tokens, attention_mask, per_token)

    def run_with_cache(
        self, *args: Any, remove_batch_dim: bool = False, return_cache_object: bool = True, **options: Any
    ) -> tuple[Any, Any]:
        """Return the output and an ActivationCache; the hook names of a filter are checked.

        Raises:
            InputError: `names_filter` names no hook point of the model, `incl_bwd` has no scalar to start from, or
                `remove_batch_dim` meets several rows.
        """
        if options.keys() & {"fwd_hooks", "bwd_hooks"}:
            raise InputError(
                "run_with_cache takes no hooks: write `with model.hooks(fwd_hooks=…):` and call it in this context"
            )
        given = args[0] if args else options.get("input")
        if remove_batch_dim and (n_rows := _n_rows(given)) > 1:
            raise InputError(f"remove_batch_dim takes one row, got {n_rows}: pass one of them, or keep the axis")
        names = options.get("names_filter")
        for name in names if isinstance(names, list | tuple) else () if names is None else (names,):
            self._check_hook_name(name)
        try:
            out, cache = super().run_with_cache(*args, remove_batch_dim=remove_batch_dim, **options)
        except RuntimeError as error:
            if not (options.get("incl_bwd") and "grad" in str(error)):
                raise
            raise InputError(
                "incl_bwd needs a scalar and gradients: pass return_type='loss', outside torch.no_grad()"
            ) from error
        return out, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim) if return_cache_object else cache

    def get_caching_hooks(
        self, *args: Any, pos_slice: Any = None, **options: Any
    ) -> tuple[dict[str, Tensor], Any, Any]:
        """Return a cache, name → [batch pos ...], and the hooks that fill it; `pos_slice` selects positions.

        TransformerLens' own method takes the axis from the end of the shape, which is that of the slots for the inside
        of experts and that of the heads for rotated queries and keys.
        """
        cache, *hooks = super().get_caching_hooks(*args, **options)
        if pos_slice is None:
            return cache, *hooks
        chosen, axes = Slice.unwrap(pos_slice), hook_points(self.cfg.n_layers)

        def sliced(name: str, save: Any) -> Any:
            axis_names = axes.get(name, "batch pos").split()
            dim = next(i for i, axis in enumerate(axis_names) if axis in ("pos", "query_pos"))
            return lambda tensor, hook: save(chosen.apply(tensor, dim=dim), hook=hook)

        return cache, *([(name, sliced(name, save)) for name, save in direction] for direction in hooks)

    def run_with_hooks(self, *args: Any, fwd_hooks: Any = (), bwd_hooks: Any = (), **options: Any) -> Any:
        """Return the output of a pass with these hooks, each a pair of a hook point's name or a filter and a function.

        Raises:
            InputError: the model has no hook point of this name.
        """
        return super().run_with_hooks(*args, fwd_hooks=list(fwd_hooks), bwd_hooks=list(bwd_hooks), **options)

    def add_hook(self, name: Any, hook: Any, *args: Any, **options: Any) -> None:
        """Add a hook at a hook point, or at all whose name a filter accepts, until `reset_hooks` removes it.

        Raises:
            InputError: the model has no hook point of this name, or the filter accepts none.
        """
        for chosen in self._chosen_hook_points(name):
            super().add_hook(chosen, hook, *args, **options)

    def _enable_hook(self, name: Any, hook: Any, dir: Any) -> None:
        for chosen in self._chosen_hook_points(name):
            super()._enable_hook(chosen, hook, dir)

    def _chosen_hook_points(self, name: Any) -> list[str]:
        """Return the names of the hook points that a name or a filter means."""
        if isinstance(name, str) and name not in self.hook_dict:
            name = _INPUT_OF_ATTENTION.sub(r"\1.\2", name)
        self._check_hook_name(name)
        chosen = [point for point in self.hook_dict if name(point)] if callable(name) else [name]
        if not chosen:  # an intervention that is nowhere would change nothing, without a word
            raise InputError(
                f"the filter of hook points accepts none of the model's {len(self.hook_dict)}: names are as "
                "'blocks.0.hook_resid_post', and model.hook_dict has them all"
            )
        return chosen

    def _check_hook_name(self, name: Any) -> None:
        if callable(name):
            return
        if not isinstance(name, str):
            raise InputError(f"{name!r:.80} is not a hook point: expected its name, or a function of names")
        if name not in self.hook_dict:
            if switch := input_points.SWITCHES.get(name.rpartition(".")[2]):
                raise InputError(f"the model has no hook point {name!r}: call model.{switch}(True) first")
            raise InputError(f"the model has no hook point {name!r}; {closest_names(name, self.hook_dict)}")

    def freeze(self) -> None:
        """Let no parameter have a gradient; a loaded model is frozen already."""
        self.requires_grad_(False)

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Accept TransformerLens' call: `attn.hook_result` is computed when it is hooked, whatever the value."""

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Add the hook points `blocks.{l}.hook_mlp_in`, or remove them; see `workbench.model.input_points`."""
        self._set_points(input_points.MLP_IN, use_hook_mlp_in)

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Add the hook points `blocks.{l}.hook_attn_in` [batch pos d_model], or remove them."""
        self._set_points(input_points.ATTENTION_IN, use_attn_in)

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Add the hook points `hook_q_input`, `hook_k_input` and `hook_v_input` of every block, or remove them."""
        self._set_points(input_points.HEAD_INPUTS, use_split_qkv_input)

    def set_ungroup_grouped_query_attention(self, ungroup_grouped_query_attention: bool) -> None:
        """Give every query head a copy of its keys and values: `hook_k` and `hook_v` are then [batch pos head d_head].

        A pass with a cache, `generate` included, is refused meanwhile.
        """
        for block in self.blocks:
            block.attn.ungrouped = ungroup_grouped_query_attention

    def _set_points(self, names: tuple[str, ...], wanted: bool) -> None:
        for block in self.blocks:
            input_points.register(block, names, wanted)
        self.setup()

    def __getattr__(self, name: str) -> Any:
        if name in ELSEWHERE:
            raise AttributeError(f"a mixture of experts has no {name}: {ELSEWHERE[name]}")
        if name in _NOT_OFFERED:
            raise AttributeError(f"{type(self).__name__} has no {name}: {_NOT_OFFERED[name]}")
        return super().__getattr__(name)

    @with_options_of(generate)
    def generate(self, input: Any, max_new_tokens: int = 256, **options: Any) -> Any:
        """Generate continuations of prompts; see `workbench.model.generate.generate`."""
        return generate(self, input, max_new_tokens, **options)

    @with_options_of(generate_stream)
    def generate_stream(
        self, input: Any, max_new_tokens: int = 256, **options: Any
    ) -> Generator[GenerationStep, None, None]:
        """Return an iterator over the steps of a generation; see `workbench.model.generate.generate_stream`."""
        return generate_stream(self, input, max_new_tokens, **options)


def _n_rows(given: Any) -> int:
    """Return how many rows an input of the model has."""
    if isinstance(given, Tensor | np.ndarray):
        return len(given) if given.ndim > 1 else 1
    several = isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 0
    return len(given) if several and not isinstance(given[0], int | np.integer) else 1
