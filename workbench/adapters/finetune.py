"""Fine-tuning: train an adapter on conversations, with a loss on the tokens that the model itself would write.

A step takes a batch of conversations and makes passes of a few of them, whose gradients are added up: the size of a
pass changes the memory and not the result. The loss is the mean cross-entropy of the taught tokens of the batch. The
state is kept in a file beside the output, from which a job that was stopped resumes.
"""

import dataclasses
import glob
import hashlib
import json
import math
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from workbench.adapters.taught import Example, read_examples
from workbench.adapters.trainable import Options, attach, attach_existing, detach, parameters, write_folder
from workbench.bounded_json import parse_json, read_json
from workbench.errors import InputError
from workbench.file_lock import FileLock
from workbench.inputs import open_regular, regular_file
from workbench.kernels.logits import logprob
from workbench.model.adapter_config import read_adapter_config
from workbench.model.lora import WEIGHTS
from workbench.model.low_rank import LowRank
from workbench.model.safetensors_file import save_tensors
from workbench.model.transformer import GptOss
from workbench.outputs import check_output, sha256, staged, write_errors
from workbench.progress import progress
from workbench.signals import StopSignal
from workbench.version import version

COMMAND = "finetune"
_PASS_TOKENS = 4096  # padded tokens of a pass
_SAVE_S = 120.0
_STATE = ".training.safetensors"  # appended to the name of the output
_PART = ".part"
_WARMUP = 0.05  # of all steps


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long and how fast: AdamW with a warm-up over 5 % of the steps, then a linear decay to zero.

    steps: None makes one pass over the data. batch: conversations of a step. clip: the largest norm of a gradient.

    Raises:
        InputError: a number is not positive, or a count is not a whole number.
    """

    steps: int | None = None
    batch: int = 8
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if (n := getattr(self, name)) is not None and n < 1:
                raise InputError(f"{name} {n}: expected a positive whole number")
        for name in ("learning_rate", "clip"):
            if not (math.isfinite(x := getattr(self, name)) and x > 0):
                raise InputError(f"{name} {x}: expected a positive number")

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step."""
        warm = max(1, round(_WARMUP * steps))
        return self.learning_rate * min((step + 1) / warm, (steps - step) / max(1, steps - warm + 1), 1.0)


def finetune(
    model: GptOss,
    data: str | Path,
    out: str | Path,
    *,
    options: Options | None = None,
    schedule: Schedule | None = None,
    channels: Collection[str] | None = None,
    adapter: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train an adapter on a file of transcripts or messages and write it as a PEFT folder; return what was done.

    The model is as before afterwards: load it with `adapter=out`. channels: of the answers only these are taught, as in
    {"final"}; None teaches all. adapter: continue from the factors of this folder. The same call resumes a
    training that was interrupted, and only returns what was done if it was killed after its last step.

    Raises:
        InputError: an option, the data or the output cannot be used, or an unfinished training has other options.
        JobError: the job was asked to stop; its state is kept.
    """
    options, schedule = options or Options(), schedule or Schedule()
    inputs = [data, *([adapter] if adapter else [])]
    state = state_path(out)
    unfinished = os.path.exists(state)
    known = unfinished or os.path.exists(Path(out) / "training.json")  # perhaps of this training: see below
    check_output(out, command=COMMAND, inputs=inputs, overwrite=overwrite or known)
    examples, digest = _read_data(model, data, channels)
    steps = schedule.steps or -(-len(examples) // schedule.batch)
    about = {
        "model": model.checkpoint.digest if model.checkpoint is not None else "",
        "tokenizer": model.tokenizer.digest,
        "chat template": hashlib.sha256((model.tokenizer.chat_template or "").encode()).hexdigest(),
        "data": digest,
        "options": dataclasses.asdict(options) | {"parts": list(options.parts)},
        "schedule": dataclasses.asdict(schedule) | {"steps": steps},
        "channels": None if channels is None else sorted(channels),
        "adapter": adapter and _weights_digest(Path(adapter)),
        "dtype": str(model.dtype),
    }
    if (unfinished or not overwrite) and (result := _finished(Path(out), about)) is not None:
        state.unlink(missing_ok=True)
        return result
    target = check_output(out, command=COMMAND, inputs=inputs, overwrite=overwrite)
    updates = attach_existing(model, options, adapter) if adapter else attach(model, options, schedule.seed)
    before = model.checkpointing
    try:
        model.checkpointing = True
        with FileLock(state), StopSignal("the training") as stop:
            _remove_parts(state)
            training = Training(model, updates, schedule, steps, state, about)
            training.run(examples, stop)
            with staged(target, command=COMMAND, inputs=inputs, overwrite=overwrite) as folder:
                write_folder(model, updates, options, folder)
                result = about | {"losses": training.losses, "tokens": training.tokens, "version": version()}
                (folder / "training.json").write_text(json.dumps(result, indent=1) + "\n")
            state.unlink(missing_ok=True)
    finally:
        model.checkpointing = before
        detach(model, updates)
    return result


def _read_data(model: GptOss, data: str | Path, channels: Collection[str] | None) -> tuple[list[Example], str]:
    """Return the conversations of a file or pipe, and the SHA-256 of the bytes that were read.

    Raises:
        InputError: it cannot be read, or a row cannot be used.
    """
    path = Path(data)
    try:
        with regular_file(data) as path:  # a pipe gives its bytes once
            examples = read_examples(path, tokenizer=model.tokenizer, n_ctx=model.cfg.n_ctx, channels=channels)
            return examples, sha256(path)
    except InputError as error:
        raise InputError(str(error).replace(str(path), str(data))) from error


def state_path(out: str | Path) -> Path:
    """Return the path of the state of a training that writes to `out`."""
    return Path(f"{Path(out)}{_STATE}")


def _finished(out: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result of a training that wrote its adapter and was killed before it removed its state."""
    try:
        recorded = read_json(out / "training.json")
    except (OSError, InputError):
        return None
    same = isinstance(recorded, dict) and all(recorded.get(name) == value for name, value in about.items())
    return recorded if same and recorded.get("losses") else None


def _remove_parts(state: Path) -> None:
    """Remove the states that killed processes had begun to write; the caller holds the lock."""
    for part in state.parent.glob(f".{glob.escape(state.name)}.*{_PART}"):
        part.unlink(missing_ok=True)


class Training:
    """The factors, the optimizer and what has been done; its state is a file of tensors."""

    def __init__(
        self,
        model: GptOss,
        updates: dict[str, LowRank],
        schedule: Schedule,
        steps: int,
        state: Path,
        about: dict[str, Any],
    ) -> None:
        self._model, self._schedule, self._steps, self._state, self._about = model, schedule, steps, state, about
        self._parameters = parameters(updates)
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
        )
        self.losses: list[float] = []
        self.tokens = 0
        self._between_steps = True  # no factor or moment is half updated
        if os.path.lexists(state):
            self._resume()

    def run(self, examples: list[Example], stop: StopSignal) -> None:
        """Make the steps that are left; the state is saved every two minutes and when the job ends early.

        Raises:
            JobError: the job was asked to stop.
        """
        saved = time.monotonic()
        done = len(self.losses)
        try:
            with progress("finetune", self._steps - done, "steps") as advance:
                for step, batch in _batches(examples, self._schedule, done, self._steps):
                    stop.check()
                    self._step(step, batch)
                    advance(1)
                    if step % max(1, self._steps // 20) == 0 or step == self._steps - 1:
                        print(f"step {step + 1:,} of {self._steps:,}: loss {self.losses[-1]:.4f}", flush=True)
                    if time.monotonic() - saved > _SAVE_S:
                        self._save()
                        saved = time.monotonic()
        except BaseException:
            if self._between_steps and len(self.losses) > done:
                self._save()
            raise

    def _step(self, step: int, batch: list[Example]) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.rate(step, self._steps)
        self._optimizer.zero_grad(set_to_none=True)
        count = sum(int(example.taught[1:].sum()) for example in batch)
        total = 0.0
        for some in _passes(batch):
            loss = summed_loss(self._model, some) / count
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise InputError(f"step {step + 1}: the loss is {total}; use a lower learning rate, or check the data")
        torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), self._schedule.clip)
        self._between_steps = False
        self._optimizer.step()
        self.losses.append(total)
        self.tokens += sum(len(example.ids) for example in batch)
        self._between_steps = True

    def _save(self) -> None:
        """Write the state to a temporary file and rename it."""
        tensors = {name: p.detach().cpu().contiguous() for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            tensors |= {f"{name}.{k}": v.cpu().contiguous() for k, v in self._optimizer.state[p].items()}
        told = json.dumps(self._about | {"losses": self.losses, "tokens": self.tokens})
        part = self._state.with_name(f".{self._state.name}.{os.getpid()}{_PART}")
        try:
            with write_errors(self._state):
                save_tensors(tensors, part, metadata={"training": told})
                os.replace(part, self._state)
        finally:
            part.unlink(missing_ok=True)

    def _resume(self) -> None:
        """Take over what an earlier process has done.

        Raises:
            InputError: the state cannot be read, or belongs to another training.
        """
        told, tensors = _read_state(self._state)
        for name, value in self._about.items():
            if told.get(name) != value:
                raise InputError(
                    f"{self._state} is an unfinished training whose {name} was {told.get(name)}, and is now {value}: "
                    "give the same value, or remove the file to start again"
                )
        try:
            self._take_over(told, tensors)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:  # RuntimeError: another shape
            raise _damaged_state(self._state, error) from error

    def _take_over(self, told: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        losses = [float(loss) for loss in told["losses"]]
        if not 0 < len(losses) <= self._steps:
            raise ValueError(f"{len(losses)} of {self._steps} steps")
        for name, p in self._parameters.items():
            p.data.copy_(tensors[name])
            moments = {k: tensors[f"{name}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq")}
            if any(v.shape != p.shape for k, v in moments.items() if k != "step"):
                raise ValueError(f"{name} has another shape")
            self._optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in moments.items()}
        self.losses, self.tokens = losses, int(told["tokens"])


def _read_state(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a state records about its training, and its tensors.

    Raises:
        InputError: it is not a state, or is damaged.
    """
    try:
        open_regular(path).close()  # no pipe, which would wait for ever
        with safe_open(path, "pt") as file:
            told = parse_json((file.metadata() or {})["training"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except Exception as error:  # SafetensorError is not a subclass of anything narrower
        raise _damaged_state(path, error) from error
    if not isinstance(told, dict):
        raise _damaged_state(path, ValueError("it states nothing about its training"))
    return told, tensors


def _damaged_state(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is damaged ({error}): remove it to begin anew")


def _weights_digest(folder: Path) -> str:
    """Return the SHA-256 of the weights of a PEFT folder.

    Raises:
        InputError: the folder has none, or no configuration that can be read.
    """
    read_adapter_config(folder)
    path = folder / WEIGHTS
    try:
        with open_regular(path):  # no pipe, which would wait for ever
            return sha256(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def summed_loss(model: GptOss, batch: list[Example]) -> Float[Tensor, ""]:
    """Return the sum over taught tokens of their cross-entropy in nats, given the tokens before them."""
    ids = [torch.from_numpy(example.ids).long() for example in batch]
    tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    rows, columns = (
        torch.cat(parts)
        for parts in zip(
            *(
                (torch.full_like(at, row), at)
                for row, at in enumerate(torch.from_numpy(example.taught[1:]).nonzero()[:, 0] for example in batch)
            ),
            strict=True,
        )
    )
    residual = model.residual(tokens, n_real=[len(example.ids) for example in batch])
    selected = residual[rows.to(residual.device), columns.to(residual.device)]
    logits = model.unembed(model.ln_final(selected[None]))[0]
    return -logprob(logits, tokens[rows, columns + 1].to(logits.device)).sum()


def _batches(examples: list[Example], schedule: Schedule, done: int, steps: int) -> Iterator[tuple[int, list[Example]]]:
    """Yield steps from `done` on and their batches: every conversation once, then again in another order."""
    drawn: list[int] = []
    round_ = 0
    for step in range(steps):
        while len(drawn) < schedule.batch:
            order = torch.randperm(
                len(examples), generator=torch.Generator().manual_seed(schedule.seed * 1_000_003 + round_)
            )
            drawn += order.tolist()
            round_ += 1
        chosen, drawn = drawn[: schedule.batch], drawn[schedule.batch :]
        if step >= done:
            yield step, [examples[i] for i in chosen]


def _passes(batch: list[Example]) -> Iterator[list[Example]]:
    """Yield conversations of similar length that together have at most `_PASS_TOKENS` tokens, padding included."""
    some: list[Example] = []
    for example in sorted(batch, key=lambda example: -len(example.ids)):
        if some and (len(some) + 1) * len(some[0].ids) > _PASS_TOKENS:
            yield some
            some = []
        some.append(example)
    if some:
        yield some
