"""A lens states what the model would predict at that depth; a tuned one predicts better on text it has not seen."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.model.conftest import BASE, random_model
from workbench.errors import InputError
from workbench.experiments import lens as lenses
from workbench.experiments.lens import TunedLens, expert_writes, fit_tuned_lens, logit_lens
from workbench.model.transformer import GptOss

X = torch.randint(BASE.d_vocab, (2, 30), generator=torch.Generator().manual_seed(1))
BEFORE_LAST = slice(0, -1)


def depths(model: GptOss, x: Tensor = X) -> list[Tensor]:
    """The stream of every depth, from a cache."""
    _, cache = model.run_with_cache(x)
    after = [cache[f"blocks.{i}.hook_resid_{end}"] for i in range(model.cfg.n_layers) for end in ("mid", "post")]
    return [cache["hook_embed"], *after]


def test_every_depth_is_read_as_by_hand(exact: GptOss) -> None:
    result = logit_lens(exact, X, at=BEFORE_LAST, of="next")
    stream = torch.stack([x[:, :-1].flatten(0, 1) for x in depths(exact)], 1)
    scale = (stream.square().mean(-1, keepdim=True) + BASE.eps).sqrt()
    logits = (stream / scale * exact.ln_final.weight) @ exact.unembed.weight.mT
    p, following = logits.softmax(-1), X[:, 1:].flatten()
    picked = torch.arange(len(following)), slice(None), following
    own = logits[picked]
    expected = {
        "logit": own,
        "logprob": p[picked].log(),
        "rank": (logits > own[..., None]).sum(-1),
        "top": p.argmax(-1),
        "entropy": torch.distributions.Categorical(p).entropy(),
        "kl": (p[:, -1:] * (p[:, -1:] / p).log()).sum(-1),
    }
    for name, values in expected.items():
        torch.testing.assert_close(torch.from_numpy(result[name].to_numpy()), values, msg=name)
    assert result.layer.values.tolist() == [-1, 0, 0, 1, 1, 2, 2]
    unweighted = (stream / scale) @ exact.unembed.weight.mT
    assert not np.allclose(result.logit, unweighted[picked], atol=1e-2), (
        "a lens without the norm's weight must not pass"
    )


@pytest.mark.parametrize("name", ["random, float32", "nano, float32", "nano, bfloat16"])
def test_the_last_depth_is_the_models_own_answer(models: dict[str, GptOss], name: str) -> None:
    model = models[name]
    tokens = X % model.cfg.d_vocab
    last = logit_lens(model, tokens, of=7).isel(depth=-1)
    assert (last.kl == 0).all()
    own = model(tokens).flatten(0, 1)[:, 7].float().numpy()
    np.testing.assert_allclose(last.logit, own, rtol=1e-5 if model.dtype == torch.float32 else 2e-2, atol=1e-4)


def test_rows_at_a_time_change_nothing_and_no_more_are_made(exact: GptOss, monkeypatch: pytest.MonkeyPatch) -> None:
    complete, made = logit_lens(exact, X, of=7), []
    read = lenses.read_out
    monkeypatch.setattr(lenses, "ROWS", 7)
    monkeypatch.setattr(lenses, "read_out", lambda model, x, at: made.append(len(x)) or read(model, x, at))
    parts = logit_lens(exact, X, of=7)
    assert max(made) == 7
    for name in complete.data_vars:
        np.testing.assert_allclose(parts[name], complete[name], atol=1e-12)


def test_padding_points_and_choices(exact: GptOss) -> None:
    both = logit_lens(exact, X, at=[-1], of=[4, 9], n_real=[30, 17])
    assert both.logit.dims == ("point", "depth", "choice")
    assert both.position.values.tolist() == [29, 16]
    alone = logit_lens(exact, X[1:, :17], at=[16], of=9)
    np.testing.assert_allclose(both.logprob.isel(point=1, choice=1), alone.logprob.isel(point=0), atol=1e-10)


def test_a_tuned_lens_predicts_better_on_text_it_has_not_seen(
    models: dict[str, GptOss], generated: tuple[Tensor, list[int]], tmp_path: Path
) -> None:
    nano, (tokens, lengths) = models["nano, float32"], generated
    tuned = fit_tuned_lens(nano, tokens[:20], n_real=lengths[:20], steps=200)
    held_out = dict(at=BEFORE_LAST, of="next", n_real=lengths[20:])
    plain = logit_lens(nano, tokens[20:], **held_out).kl.mean("point")
    better = logit_lens(nano, tokens[20:], tuned=tuned, **held_out).kl.mean("point")
    assert (better[:-1] < 0.7 * plain[:-1]).all(), (plain.values, better.values)  # seen: 0.35 to 0.53
    assert better[-1] == 0
    # The same maps at the wrong depths.
    wrong = TunedLens(tuned.A.flip(0), tuned.b.flip(0))
    worse = logit_lens(nano, tokens[20:], tuned=wrong, **held_out).kl.mean("point")
    assert not (worse[:-1] < 0.7 * plain[:-1]).all()

    tuned.save(tmp_path / "lens.safetensors")
    tuned.save(tmp_path / "lens.safetensors")  # a lens is replaced, and nothing else
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(InputError, match="exists and was not written by"):
        tuned.save(tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "precious"
    again = TunedLens.load(tmp_path / "lens.safetensors", nano)
    assert torch.equal(again.A, tuned.A)
    assert torch.equal(again.b, tuned.b)
    with pytest.raises(InputError, match="another model's lens"):
        TunedLens.load(tmp_path / "lens.safetensors", models["random, float32"])
    (tmp_path / "no").write_text("nothing")
    with pytest.raises(InputError, match="no safetensors file"):
        TunedLens.load(tmp_path / "no", nano)


def test_fitting_leaves_the_model_alone_and_works_on_packed_bfloat16(
    models: dict[str, GptOss], generated: tuple[Tensor, list[int]]
) -> None:
    trainable, nano = random_model(BASE), models["nano, bfloat16"]
    fit_tuned_lens(trainable, X, steps=2)
    assert all(p.grad is None for p in trainable.parameters())
    tuned = fit_tuned_lens(nano, generated[0][:8], n_real=generated[1][:8], steps=60)
    kl = [
        logit_lens(nano, generated[0][8:12], of=3, tuned=t, n_real=generated[1][8:12]).kl.mean() for t in (None, tuned)
    ]
    assert kl[1] < kl[0]


def test_no_map_is_the_logit_lens(exact: GptOss) -> None:
    plain, same = logit_lens(exact, X, of=7), logit_lens(exact, X, of=7, tuned=TunedLens.identity(exact))
    np.testing.assert_allclose(same.logit, plain.logit, atol=1e-5)


def by_hand(model: GptOss, gated: bool) -> Tensor:
    """[layer expert d_vocab]: mean of what every expert adds to the logits, less the mean over the vocabulary."""
    _, cache = model.run_with_cache(X)
    u = model.ln_final.weight * model.unembed.weight
    out = torch.full((BASE.n_layers, BASE.num_experts, BASE.d_vocab), torch.nan)
    for layer in range(BASE.n_layers):
        block = f"blocks.{layer}.mlp"
        written = cache[f"{block}.experts.hook_out"] / cache["ln_final.hook_scale"][..., None, :]
        written = written * cache[f"{block}.hook_expert_weights"][..., None] if gated else written
        for expert in range(BASE.num_experts):
            mine = written[cache[f"{block}.hook_expert_indices"] == expert]
            logits = (mine @ u.mT).mean(0)
            out[layer, expert] = logits - logits.mean()
    return out


def test_experts_write_what_their_slots_add_to_the_logits(exact: GptOss) -> None:
    result = expert_writes(exact, X, k=5)
    assert result.n.sum("expert").values.tolist() == [X.numel() * BASE.experts_per_token] * BASE.n_layers
    for gated in (True, False):
        top = by_hand(exact, gated).topk(5, -1)
        assert np.allclose(result.logit, top.values, atol=1e-4) == gated, "ungated outputs must not pass"
    ids = by_hand(exact, True).gather(-1, torch.from_numpy(result.token.to_numpy()))
    np.testing.assert_allclose(ids, result.logit, atol=1e-4)


def test_an_expert_that_always_writes_a_token_is_found_and_an_idle_one_is_marked() -> None:
    model = random_model(BASE).requires_grad_(False)
    experts, router = model.blocks[1].mlp.experts, model.blocks[1].mlp.router
    experts.down.weight[6] = 0
    experts.down.bias[6] = 20 * model.unembed.weight[17] / model.ln_final.weight
    router.bias[2] = -1e9
    result = expert_writes(model, X)
    assert result.token.sel(layer=1, expert=6)[0] == 17
    assert (result.token.sel(layer=1, expert=2) == -1).all()
    assert result.logit.sel(layer=1, expert=2).isnull().all()
    assert result.n.sel(layer=1, expert=2) == 0
