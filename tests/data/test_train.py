"""Training is the same whether or not it was interrupted, and rounds the experts to what MXFP4 holds."""

from pathlib import Path

import pytest
import torch

from workbench.data import train
from workbench.data.train import NANO, Training, batches, matrices, packed
from workbench.kernels.mxfp4 import dequantise, quantise
from workbench.model import GptOss


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "BATCH", 4)


def test_batches_do_not_depend_on_where_one_starts() -> None:
    from_start = batches(0, 0)
    first = [next(from_start) for _ in range(20)]
    later = batches(0, 11)
    assert [next(later) for _ in range(9)] == first[11:]


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """The cut falls before the experts start to be rounded, and a second one after."""
    straight = Training(tmp_path / "a", seed=3)
    straight.run(10)
    broken = Training(tmp_path / "b", seed=3)
    for stop in (5, 8):
        broken.run(10, stop_at=stop)
        broken = Training(tmp_path / "b", seed=99)
        broken.resume()
    broken.run(10)
    assert broken.step == straight.step == 10
    for name, tensor in straight.weights().items():
        assert torch.equal(broken.weights()[name], tensor), name


def test_rounded_experts_are_already_what_packing_gives(tmp_path: Path) -> None:
    training = Training(tmp_path, seed=0)
    training.round_experts()
    checkpoint = packed(training.weights())
    for layer, matrix in enumerate(list(matrices(training.model))[::2]):
        stem = f"blocks.{layer}.mlp.experts.gate_up."
        unpacked = dequantise(checkpoint[stem + "blocks"], checkpoint[stem + "scales"], torch.float32).mT
        assert torch.equal(matrix.weight, unpacked)


def test_gradients_pass_the_rounding(tmp_path: Path) -> None:
    training = Training(tmp_path, seed=0)
    training.round_experts()
    entropy, _ = train.loss(training.model, next(batches(0, 0)))
    entropy.backward()
    for name, p in training.model.named_parameters():
        if "original" in name:
            assert p.grad is not None
            assert p.grad.abs().sum() > 0


def test_the_loss_is_that_of_every_taught_token_given_what_comes_before() -> None:
    """Oracle: an example at a time, unpadded, in float64; and the load of every expert counted one by one."""
    model = GptOss(NANO).reset_parameters(1)
    batch = next(batches(2, 0))
    surprise, scores = [], [[] for _ in range(NANO.n_layers)]
    for ids, taught in batch:
        with torch.no_grad():
            logits, cache = model.run_with_cache(torch.tensor([ids]))
        chance = logits[0].double().log_softmax(-1)
        surprise += [-chance[i - 1, ids[i]] for i in range(1, len(ids)) if taught[i]]
        for layer, layer_scores in enumerate(scores):
            layer_scores.append(cache[f"blocks.{layer}.mlp.router.hook_out"][0].double())
    imbalance = []
    for layer_scores in scores:
        score = torch.cat(layer_scores)
        chosen = torch.bincount(score.topk(NANO.experts_per_token).indices.flatten(), minlength=NANO.num_experts)
        imbalance.append(NANO.num_experts * (chosen / chosen.sum() * score.softmax(-1).mean(0)).sum())
    entropy, balance = train.loss(model, batch)
    assert entropy.item() == pytest.approx(torch.stack(surprise).mean().item(), rel=1e-5)
    assert balance.item() == pytest.approx(torch.stack(imbalance).mean().item(), rel=1e-5)


def test_training_lowers_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "WARMUP", 1)
    training = Training(tmp_path, seed=0)
    batch = next(batches(5, 0))
    before = train.loss(training.model, batch)[0].item()
    training.run(15)
    assert train.loss(training.model, batch)[0].item() < before - 1


def test_packing_keeps_every_other_weight(tmp_path: Path) -> None:
    weights = Training(tmp_path, seed=0).weights()
    stem = "blocks.1.mlp.experts.down."
    blocks, scales = quantise(weights[stem + "weight"].mT.contiguous())
    checkpoint = packed(weights)
    assert torch.equal(checkpoint[stem + "blocks"], blocks)
    assert torch.equal(checkpoint[stem + "scales"], scales)
    assert torch.equal(checkpoint["embed.weight"], weights["embed.weight"].bfloat16())
