"""Train nano: `python -m workbench.data.train --out data/nano` (82 minutes on one core beside a busy one).

One process on the CPU, seeded and resumable (`--resume`): the training state is stored in OUT.training until the
training is complete. In the last part the experts are trained through their rounding to MXFP4, so packing does not cost
accuracy; OUT.dense contains the same weights before packing.
"""

import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from workbench.counting import count_of
from workbench.data import vocabulary
from workbench.data.command import run
from workbench.data.conversations import Example, training_example
from workbench.data.vocabulary import ID, VOCABULARY
from workbench.errors import InputError
from workbench.kernels.mxfp4 import dequantise, quantise
from workbench.model.config import Config, Rope
from workbench.model.export import save_checkpoint
from workbench.model.layers import ExpertMatrix
from workbench.model.transformer import GptOss
from workbench.outputs import check_output
from workbench.progress import progress

NANO = Config(
    d_model=128,
    n_layers=4,
    n_heads=8,
    n_key_value_heads=1,
    d_head=16,
    d_mlp=128,
    d_vocab=-8 * (-len(VOCABULARY) // 8),
    num_experts=16,
    experts_per_token=4,
    windows=(16, None, 16, None),
    n_ctx=1024,
    eps=1e-5,
    swiglu_limit=7.0,
    swiglu_alpha=1.702,
    rope=Rope(theta=10_000.0, factor=4.0, beta_fast=32.0, beta_slow=1.0, original_ctx=256, truncate=False),
)
PEAK_LR, WARMUP, BATCH, BALANCE = 3e-3, 200, 64, 0.01
ROUNDED = 0.6  # from this share of the training on, the experts are what MXFP4 can hold


class Rounded(nn.Module):
    """A dense expert matrix rounded to MXFP4 in the forward pass; gradients pass as if it were not rounded."""

    def forward(self, weight: Tensor) -> Tensor:
        packed = quantise(weight.detach().mT.contiguous())
        return weight + (dequantise(*packed, weight.dtype).mT - weight).detach()


def matrices(model: GptOss) -> list[ExpertMatrix]:
    """Return the modules that hold an expert matrix."""
    return [module for module in model.modules() if isinstance(module, ExpertMatrix)]


def batches(seed: int, step: int) -> Iterator[list[Example]]:
    """Return batches of similar lengths, to avoid padding; deterministic from a given step on."""
    while True:
        rng = random.Random(f"{seed} {step // 8}")
        pool = sorted((training_example(rng) for _ in range(8 * BATCH)), key=lambda example: len(example.ids))
        groups = [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
        rng.shuffle(groups)
        for group in groups[step % 8 :]:
            yield group
            step += 1


def loss(model: GptOss, batch: list[Example]) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy on trained tokens and the load-balancing loss of arXiv 2101.03961, eq. 4 to 6."""
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    tokens = pad([torch.tensor(example.ids) for example in batch], padding_value=ID["<|pad|>"])
    taught = pad([torch.tensor(example.taught) for example in batch])[:, 1:]
    scores: list[Tensor] = []
    points = [
        (f"blocks.{layer}.mlp.router.hook_out", lambda t, hook: scores.append(t)) for layer in range(model.cfg.n_layers)
    ]
    with model.hooks(fwd_hooks=points):
        logits = model(tokens)
    entropy = nn.functional.cross_entropy(logits[:, :-1][taught], tokens[:, 1:][taught])
    real = tokens != ID["<|pad|>"]
    return entropy, torch.stack([_imbalance(t[real], model.cfg.experts_per_token) for t in scores]).mean()


def _imbalance(scores: Tensor, k: int) -> Tensor:
    chosen = torch.zeros_like(scores).scatter_(1, scores.topk(k).indices, 1.0).mean(0) / k
    return scores.shape[1] * (chosen * scores.softmax(-1).mean(0)).sum()


def learning_rate(done: float, step: int) -> float:
    """Return the learning rate: warm-up, then a cosine to a twentieth."""
    return PEAK_LR * min(1.0, (step + 1) / WARMUP) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


class Training:
    """The state of a training: weights, optimizer, step, time and tokens."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.model = GptOss(NANO).reset_parameters(seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
        self.step, self.tokens, self.spent_s = 0, 0, 0.0

    def round_experts(self) -> None:
        """Train through the rounding to MXFP4 from here on."""
        for matrix in matrices(self.model):
            if not parametrize.is_parametrized(matrix):
                parametrize.register_parametrization(matrix, "weight", Rounded())

    def weights(self) -> dict[str, Tensor]:
        """Return the weights under their canonical names, the experts unrounded."""
        return {
            n.replace("parametrizations.weight.original", "weight"): p.detach()
            for n, p in self.model.named_parameters()
        }

    def save(self) -> None:
        """Write the state to a temporary file and rename it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {"weights": self.weights(), "optimizer": self.optimizer.state_dict(), "seed": self.seed}
        torch.save(state | {k: getattr(self, k) for k in ("step", "tokens", "spent_s")}, self.folder / "state.new")
        os.replace(self.folder / "state.new", self.folder / "state.pt")

    def resume(self) -> None:
        """Load the state that `save` wrote.

        Raises:
            InputError: there is no training to resume.
        """
        if not (self.folder / "state.pt").exists():
            raise InputError(f"{self.folder} holds no training to resume: leave out --resume")
        state = torch.load(self.folder / "state.pt", weights_only=True)
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.seed, self.step, self.tokens, self.spent_s = (state[k] for k in ("seed", "step", "tokens", "spent_s"))

    def run(self, steps: int, *, stop_at: int | None = None) -> None:
        """Train until `steps` have been made in all, resumed ones included; `stop_at` pauses earlier."""
        last_save = time.monotonic()
        with progress("train", steps - self.step, "steps") as advance:
            for batch in batches(self.seed, self.step):
                if self.step >= (stop_at or steps):
                    break
                entropy, imbalance = self._take(batch, self.step / steps)
                advance(1)
                if self.step % 100 == 0:
                    print(
                        f"step {self.step:,} of {steps:,}  {self.spent_s / 60:.1f} min  {self.tokens:,} tokens at "
                        f"{self.tokens / self.spent_s:,.0f}/s  loss {entropy:.4f}  imbalance {imbalance:.2f}",
                        flush=True,
                    )
                if time.monotonic() - last_save > 120:
                    self.save()
                    last_save = time.monotonic()
        self.save()

    def _take(self, batch: list[Example], done: float) -> tuple[float, float]:
        """Make one step and return its cross-entropy and load imbalance; `done` is the fraction of steps made."""
        start = time.monotonic()
        if done >= ROUNDED:
            self.round_experts()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(done, self.step)
        entropy, imbalance = loss(self.model, batch)
        self.optimizer.zero_grad(set_to_none=True)
        (entropy + BALANCE * imbalance).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.tokens += sum(len(example.ids) for example in batch)
        self.spent_s += time.monotonic() - start
        return entropy.item(), imbalance.item()


def packed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights as a checkpoint stores them: bfloat16, the expert matrices in MXFP4."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith((".gate_up.weight", ".down.weight")):
            stem = name.removesuffix("weight")
            tensors[stem + "blocks"], tensors[stem + "scales"] = quantise(tensor.mT.contiguous())
        else:
            tensors[name] = tensor.bfloat16()
    return tensors


def write(training: Training, out: Path) -> None:
    """Write OUT, and OUT.dense with the same weights in bfloat16 before packing."""
    weights = training.weights()

    def describe(folder: Path) -> None:
        vocabulary.write(folder)
        facts = {
            "seed": training.seed,
            "steps": training.step,
            "sequences": training.step * BATCH,
            "tokens": training.tokens,
            "minutes": round(training.spent_s / 60),
        }
        (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")

    save_checkpoint(_beside(out, "dense"), NANO, {n: t.bfloat16() for n, t in weights.items()}, extra=describe)
    save_checkpoint(out, NANO, packed(weights), extra=describe)
    print(f"{out}: {count_of(training.step, 'step')}, {training.tokens:,} tokens, {training.spent_s / 60:.0f} min")


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.name}.{what}")


def main(
    out: Annotated[Path, typer.Option(help="The checkpoint to write.")],
    steps: Annotated[int, typer.Option(min=1)] = 4700,
    seed: int = 0,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    resume: Annotated[bool, typer.Option(help="Go on from OUT.training.")] = False,
) -> None:
    """Train nano and write it as a checkpoint with packed experts, and as one with dense experts beside it.

    Raises:
        InputError: the output exists, or an unfinished training is in its folder.
    """
    for folder in (out, _beside(out, "dense")):
        if check_output(folder, command="data.train", overwrite=True, owned=Path.exists).exists():
            raise InputError(f"{folder} exists: choose another folder, or move it away")
    torch.set_num_threads(threads)
    training = Training(_beside(out, "training"), seed)
    if resume:
        training.resume()
    elif training.folder.exists():
        raise InputError(f"{training.folder} holds an unfinished training: --resume it, or move it away")
    training.run(steps)
    write(training, out)
    shutil.rmtree(training.folder)


if __name__ == "__main__":
    run(main)
