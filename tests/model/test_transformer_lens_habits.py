"""What TransformerLens' users type works, or its error names the right thing: counted, so that none is lost."""

import re
from typing import Any

import pytest
import torch
import transformer_lens
import transformer_lens.patching
import transformer_lens.tools.analysis
import transformer_lens.utilities

import workbench as wb
from workbench.errors import InputError

HABITS = """
m.to_str_tokens(S); m.to_str_tokens(S, prepend_bos=False); m.to_str_tokens([S, S]); m.to_tokens([S, "1"])
m.to_single_str_token(7); m.get_token_position("3", S); m.tokenizer.eos_token_id; m.tokenizer.pad_token_id
m.tokenizer(S); m.tokenizer.vocab_size; m(S); m([S, S]); m(T, return_type="loss"); m(S, return_type="both")
m(T, stop_at_layer=2); m(T.tolist()); m(T[0]); m(T, attention_mask=torch.ones_like(T)); m(T, past_kv_cache=None)
m(T, padding_side="left"); m(T, prepend_bos=False); m.loss_fn(m(T), T); m.run_with_cache(S)
m.run_with_cache(S, return_type="loss"); m.run_with_cache(T, pos_slice=-1)
m.run_with_cache(T, return_cache_object=False)
m.run_with_hooks(S, fwd_hooks=[("blocks.1.hook_resid_post", lambda v, hook: v)]); m.W_E.shape; m.W_U.shape
m.blocks[1].ln1.w; m.ln_final.w; m.unembed.W_U; m.embed.W_E; m.blocks[1].mlp.experts.W_in(3); m.b_in.shape
m.b_out.shape; m.blocks[1].mlp.b_in; m.cfg.model_name; m.cfg.d_vocab_out; m.cfg.default_prepend_bos
m.cfg.tokenizer_name; m.cfg.to_dict(); m.cfg.attn_types; m.cfg.gated_mlp; m.cfg.window_size; m.cfg.rotary_dim
m.cfg.original_architecture; m.cfg.device; m.cfg.dtype; m.generate(S, max_new_tokens=2)
m.generate([S], max_new_tokens=2); m.generate(T, max_new_tokens=2, return_type="str")
m.generate(T, max_new_tokens=2, do_sample=False); m.generate(T, max_new_tokens=2, top_k=5)
m.generate(T, max_new_tokens=2, top_p=.9); m.generate(T, max_new_tokens=2, stop_at_eos=False)
m.generate(T, max_new_tokens=2, eos_token_id=3); m.generate(T, max_new_tokens=2, verbose=False); m.generate(S, 2)
m.generate(input=T, max_new_tokens=2); m.generate(T, 2, use_past_kv_cache=False)
m.generate(T, 2, repetition_penalty=1.2); m.generate(T, 2, do_sample=True, temperature=0.7, freq_penalty=0.5)
m.set_use_attn_result(True); m.freeze(); m.tokens_to_residual_directions(["7", "8"]); m.all_head_labels()
c["resid_post", 1]; c["resid_post", -1]; c["sink", 1]; c["router", 1]; c["post", 0]; c["pattern", 1]
c["scale", 0, "ln1"]; c["embed"]; m.all_composition_scores("Q"); m.get_params(); m.set_use_hook_mlp_in(True)
m.set_use_attn_in(True); m.set_use_split_qkv_input(True); m.set_ungroup_grouped_query_attention(True)
c.stack_neuron_results(layer=1); c.get_neuron_results(0); c.get_full_resid_decomposition(expand_neurons=True)
tl.SVDInterpreter(m).get_singular_vectors("OV", 1, 4, 0); m.run_with_cache([S, "7"], padding_side="left")
m.blocks[0](m.embed(T)); m.blocks[0].attn.cfg.d_head; m.blocks[0].mlp.router.W; m.unembed.b_U
m.cfg.use_split_qkv_input; m.cfg.attention_dir; m.cfg.attn_scale; m.cfg.rotary_base; m.cfg.n_devices; m.cfg.final_rms
m.cfg.use_local_attn; m.cfg.output_logits_soft_cap; m.tokenizer.encode(S, add_special_tokens=False)
m.tokenizer(S, return_tensors="pt", truncation=True, max_length=3)
m.run_with_cache(T, names_filter=lambda n: n.endswith("pattern"))
m.run_with_cache(T, names_filter=[ut.get_act_name("resid_post", l) for l in range(4)], return_type=None)
c[ut.get_act_name("pattern", 2)]; c.apply_ln_to_stack(c.accumulated_resid(pos_slice=-1), pos_slice=-1)
c.apply_slice_to_batch_dim(0); c.stack_head_results(layer=2, pos_slice=-1, incl_remainder=True)
c.stack_activation("sink"); c.to("cpu"); len(c); c.keys(); m.add_hook("hook_embed", lambda v, hook: v)
m.add_perma_hook("hook_embed", lambda v, hook: v); m.reset_hooks(including_permanent=True)
m.add_caching_hooks("hook_embed"); m.get_caching_hooks(lambda n: "resid" in n)
m.hook_dict["blocks.0.attn.hook_pattern"].name
m.eval() and patching.get_act_patch_resid_pre(m, m.to_tokens("1"), m.run_with_cache("3")[1], lambda l: l[0, -1, 7])
ut.lm_accuracy(m(T), T); ut.test_prompt("12+3", "4", m); c.decompose_resid(return_labels=True)
c.accumulated_resid(return_labels=True); c.logit_attrs(c.decompose_resid(), tokens="7")
"""
# With gradients, on a model without switches.
TOOLS = """
c.logit_lens(layers=[0, 1], positions=-1, targets=["7"]).values; an.logit_lens(m, T, return_type="log_probs").values
an.logit_lens(m, T, top_k=3).top_tokens(m.tokenizer); an.direct_logit_attribution(m, T, "7")
an.attribution_patch(m, T, m.to_tokens("98-76"), lambda l: l[0, -1, 7] - l[0, -1, 8])
an.attention_head_subspace_affinity(m, target_role="Q")
patching.get_act_patch_direct_path(m, T, m.run_with_cache("98-76")[1], c, lambda l: l[0, -1, 7], 0, 1, verbose=False)
m.generate(T, 2, attention_mask=torch.tensor([[0, 0, 1, 1, 1]])); m.to_str_tokens(torch.tensor(7)); m.to_str_tokens(7)
c["pattern1attn"]; c["pattern", 1, "attn"]; c["k1a"]; m.n_params_total; m.blocks_with("attn"); m.attn_head_labels
m.composition_layer_indices(); dict(m.tl_named_parameters()); m.cfg.tokenizer_prepends_bos; m.cfg.tie_word_embeddings
m.cfg.default_padding_side; m.run_with_cache([S], remove_batch_dim=True)[1]["resid_post", 1].shape
"""


@pytest.mark.parametrize(("text", "gradients", "least"), [(HABITS, False, 110), (TOOLS, True, 20)])
def test_habits_work(text: str, gradients: bool, least: int) -> None:
    model = wb.load("nano", dtype=torch.float32, device="cpu")
    failed, lines = [], [line.strip() for line in text.replace("\n", ";").split(";") if line.strip()]
    with torch.set_grad_enabled(gradients):
        tokens = model.to_tokens("12+34")
        names = {
            "m": model,
            "S": "12+34",
            "T": tokens,
            "c": model.run_with_cache(tokens)[1],
            "torch": torch,
            "tl": transformer_lens,
            "ut": transformer_lens.utilities,
            "patching": transformer_lens.patching,
            "an": transformer_lens.tools.analysis,
        }
        for line in lines:
            try:
                eval(line, names)
            except Exception as error:
                failed.append(f"{line}: {error}")
    assert failed == []
    assert len(lines) >= least


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("m.W_in", "each expert has its own"),
        ("m.blocks[1].mlp.W_in", "each expert has its own"),
        ("m.W_pos", "positions are rotary"),
        ("m.enable_compatibility_mode()", "weights stay as published"),
        ("m.process_weights_(fold_ln=True)", "weights stay as published"),
        ("m.tokenizer.apply_chat_template([])", "workbench.harmony.render"),
        ("m.tokenizer.encode('1', return_tensors='pt')", "encode returns a list"),
        ("m.run_with_hooks(T, fwd_hooks=[(['hook_embed'], print)])", "is not a hook point"),
        ("m.run_with_cache(T, names_filter=[0])", "0 is not a hook point"),
        ("m.run_with_cache(T, incl_bwd=True)", "return_type='loss'"),
        ("m.run_with_cache(['1', '2'], remove_batch_dim=True)", "remove_batch_dim takes one row, got 2"),
        ("m.run_with_cache(torch.cat([T, T]), remove_batch_dim=True)", "remove_batch_dim takes one row, got 2"),
        ("m.run_with_cache(T)[1]['pattern', 1, 'mlp']", "'pattern' is attn.hook_pattern, not in 'mlp'"),
        ("m.generate(T, 2, output_logits=True)", "generate has no option 'output_logits': model(output)"),
        ("m.generate(T, 2, return_cache=True)", "model.run_with_cache(output"),
        ("m.generate(T, 2, beams=4)", "generate has no option 'beams': use temperature, do_sample"),
        ("m.generate_stream(T, 2, verbose=False)", "generate_stream has no option 'verbose': every step is yielded"),
        ("m.run_with_cache(T, fwd_hooks=[('hook_embed', print)])", "write `with model.hooks(fwd_hooks=…):`"),
        ("m.original_model", "it wraps no other model"),
        ("m.input_to_embed(T)", "use model.embed"),
        ("m.run_with_hooks(T, fwd_hooks=[('blocks.1.hook_q_input', print)])", "call model.set_use_split_qkv_input"),
        ("m.add_hook('blocks.1.hook_resid_pst', print)", "has no hook point 'blocks.1.hook_resid_pst'; closest"),
        ("m.add_hook('blocks.1.mlp.hook_post', print)", "each expert has its own: mlp.experts.hook_post"),
        ("m.add_hook(lambda name: name.endswith('mlp.hook_post'), print)", "accepts none of the model's"),
        ("m.hooks(fwd_hooks=[('blocks.9.hook_z', print)]).__enter__()", "has no hook point 'blocks.9.hook_z'"),
        ("m.run_with_hooks(T, fwd_hooks=[(lambda name: 'mlp.hook_in' in name, print)])", "accepts none of the model's"),
    ],
)
def test_what_cannot_be_states_where_it_is(line: str, reason: str) -> None:
    model = wb.load("nano", dtype=torch.float32, device="cpu")
    with pytest.raises((AttributeError, InputError), match=re.escape(reason)):
        eval(line, {"m": model, "T": model.to_tokens("12+34"), "torch": torch})


@pytest.mark.parametrize("frozen", [True, False])
def test_backward_activations_are_cached(frozen: bool) -> None:
    """A loaded model is frozen, and TransformerLens' is not: gradients of activations are the same."""
    model = wb.load("nano", dtype=torch.float32, device="cpu")
    model.requires_grad_(True)
    _, trained = model.run_with_cache("12+34", return_type="loss", incl_bwd=True)
    model.zero_grad()
    model.requires_grad_(not frozen)
    _, cache = model.run_with_cache("12+34", return_type="loss", incl_bwd=True)
    assert cache["blocks.1.hook_resid_post_grad"].abs().max() > 0
    assert cache["hook_embed_grad"].abs().max() > 0
    assert cache.keys() == trained.keys()
    for name in cache:
        if name.endswith("_grad"):
            torch.testing.assert_close(cache[name], trained[name], msg=name)
    assert (model.blocks[0].ln1.weight.grad is None) == frozen
    assert not torch.allclose(cache["blocks.0.hook_resid_post_grad"], cache["blocks.1.hook_resid_post_grad"]), "control"


def test_attribution_patching_as_in_the_demonstration() -> None:
    """Backward hooks by `add_hook`, on a frozen model: (clean − corrupt) · gradient is what a small patch changes."""
    model = wb.load("nano", dtype=torch.float64, device="cpu")
    gradients: dict[str, torch.Tensor] = {}

    def keep(grad: torch.Tensor, hook: Any) -> None:
        gradients[hook.name] = grad.detach()

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, 7] - logits[0, -1, 8]

    tokens = model.to_tokens("12+34")
    model.add_hook(lambda name: name.endswith("resid_post"), keep, "bwd")
    metric(model(tokens)).backward()
    model.reset_hooks()
    assert len(gradients) == model.cfg.n_layers
    assert not model(tokens).requires_grad, "without a backward hook, a frozen model makes no graph"
    step = 1e-6 * torch.randn(1, 5, model.cfg.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for layer in (0, 1):
        name = f"blocks.{layer}.hook_resid_post"
        changed = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x + step)])
        change = float(metric(changed) - metric(model(tokens)))
        assert float((gradients[name] * step).sum()) == pytest.approx(change, rel=1e-2)
        other = gradients[f"blocks.{layer + 1}.hook_resid_post"]
        assert float((other * step).sum()) != pytest.approx(change, rel=1e-2), "negative control"


def test_the_lens_of_transformer_lens_reads_what_ours_reads() -> None:
    """Its last entry is the model's logits, and its entries are those of `workbench.experiments.lens`."""
    from workbench.experiments.lens import logit_lens

    model = wb.load("nano", dtype=torch.float32, device="cpu")
    tokens = model.to_tokens("12+34=")
    with torch.no_grad():
        theirs = transformer_lens.tools.analysis.logit_lens(model, tokens, positions=-1)
        torch.testing.assert_close(theirs.values[-1, 0], model(tokens)[0, -1], rtol=1e-4, atol=1e-4)
        ours = logit_lens(model, tokens, at=[5], of=7)
    streams = ours["logit"].isel(depth=ours["after"].values != "attn", point=0).values
    assert theirs.values[:, 0, 7].tolist() == pytest.approx(streams.tolist(), abs=1e-3)
    assert theirs.values[:, 0, 8].tolist() != pytest.approx(streams.tolist(), abs=1e-3), "negative control"


def test_tokens_outside_the_mask_of_a_prompt_are_padding() -> None:
    model = wb.load("nano", dtype=torch.float32, device="cpu")
    tokens = model.to_tokens("7712+34=")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    masked = model.generate(tokens, 4, attention_mask=mask, return_type="new_tokens")
    assert masked == model.generate(tokens[:, 2:], 4, return_type="new_tokens")
    assert masked != model.generate(tokens, 4, return_type="new_tokens"), "negative control: padding counts"
