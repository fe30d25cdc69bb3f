"""What TransformerLens' users type works, or its error names the right thing: counted, so that none is lost."""

import re

import pytest
import torch
import transformer_lens
import transformer_lens.patching
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


def test_habits_work() -> None:
    model = wb.load("nano", dtype=torch.float32, device="cpu")
    failed, lines = [], [line.strip() for line in HABITS.replace("\n", ";").split(";") if line.strip()]
    with torch.no_grad():
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
        }
        for line in lines:
            try:
                eval(line, names)
            except Exception as error:
                failed.append(f"{line}: {error}")
    assert failed == []
    assert len(lines) >= 110


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
        ("m.run_with_hooks(T, fwd_hooks=[('blocks.1.hook_q_input', print)])", "call model.set_use_split_qkv_input"),
    ],
)
def test_what_cannot_be_states_where_it_is(line: str, reason: str) -> None:
    model = wb.load("nano", dtype=torch.float32, device="cpu")
    with pytest.raises((AttributeError, InputError), match=re.escape(reason)):
        eval(line, {"m": model, "T": model.to_tokens("12+34")})


def test_backward_activations_are_cached() -> None:
    model = wb.load("nano", dtype=torch.float32, device="cpu")
    model.requires_grad_(True)
    _, cache = model.run_with_cache("12+34", return_type="loss", incl_bwd=True)
    assert cache["blocks.1.hook_resid_post_grad"].abs().max() > 0
