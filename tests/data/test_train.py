"""Training is the same whether or not it was interrupted, and rounds the experts to what MXFP4 holds."""

from pathlib import Path

import pytest
import torch

from workbench.data import train
from workbench.data.train import Training, batches, matrices, packed
from workbench.kernels.mxfp4 import dequantise, quantise


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "BATCH", 4)


def test_batches_do_not_depend_on_where_one_starts() -> None:
    whole = batches(0, 0)
    first = [next(whole) for _ in range(20)]
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


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    training = Training(tmp_path, seed=0)
    batch = next(batches(5, 0))
    before = train.loss(training.model, batch)[0].item()
    training.run(15)
    assert train.loss(training.model, batch)[0].item() < before - 0.5


def test_packing_keeps_every_other_weight(tmp_path: Path) -> None:
    weights = Training(tmp_path, seed=0).weights()
    stem = "blocks.1.mlp.experts.down."
    blocks, scales = quantise(weights[stem + "weight"].mT.contiguous())
    checkpoint = packed(weights)
    assert torch.equal(checkpoint[stem + "blocks"], blocks)
    assert torch.equal(checkpoint[stem + "scales"], scales)
    assert torch.equal(checkpoint["embed.weight"], weights["embed.weight"].bfloat16())
