"""Training makes PEFT's steps on weights that stay packed, resumes bit for bit, and teaches what it is shown."""

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file

import workbench as wb
from tests.model.adapters import SHAPE, dense_and_packed
from tests.model.conftest import SHAPES, to_hf
from workbench.adapters import finetune as module
from workbench.adapters.finetune import Schedule, Training, finetune, summed_loss
from workbench.adapters.taught import Example
from workbench.adapters.trainable import TRAINABLE, Options, attach, attach_existing, detach, write_folder
from workbench.errors import InputError, JobError
from workbench.model.low_rank import LowRank
from workbench.model.transformer import GptOss
from workbench.signals import StopSignal

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
OPTIONS = Options(tuple(TRAINABLE), rank=3, alpha=7.0)
SCHEDULE = Schedule(20, batch=3, learning_rate=3e-3, weight_decay=0.01, seed=1)


@pytest.fixture
def models() -> tuple[GptOss, GptOss]:
    return dense_and_packed(SHAPES[SHAPE])


def examples(n: int = 7) -> list[Example]:
    rng = np.random.default_rng(0)
    made = []
    for length in rng.integers(12, 40, n):
        ids = rng.integers(SHAPES[SHAPE].d_vocab, size=length).astype(np.int32)
        made.append(Example(ids, np.arange(length) >= length // 3))
    return made


def start(model: GptOss, folder: Path) -> None:
    """Write a folder with an adapter that has an effect, from which both sides continue."""
    updates = attach(model, OPTIONS, seed=3)
    for update in updates.values():
        torch.nn.init.normal_(update.b, 0, 0.05, generator=torch.Generator().manual_seed(5))
    write_folder(model, updates, OPTIONS, folder)
    detach(model, updates)


def losses_of_peft(dense: GptOss, folder: Path) -> list[float]:
    peft = PeftModel.from_pretrained(to_hf(dense), folder, is_trainable=True)
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=SCHEDULE.weight_decay)
    losses = []
    for step, batch in module._batches(examples(), SCHEDULE, 0, SCHEDULE.steps):
        optimizer.param_groups[0]["lr"] = SCHEDULE.rate(step, SCHEDULE.steps)
        optimizer.zero_grad()
        taught = [
            -peft(torch.from_numpy(e.ids).long()[None])
            .logits[0, :-1]
            .log_softmax(-1)
            .gather(1, torch.from_numpy(e.ids).long()[1:, None])[torch.from_numpy(e.taught[1:]), 0]
            for e in batch
        ]
        loss = torch.cat(taught).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, SCHEDULE.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(model: GptOss, updates: dict[str, LowRank], state: Path) -> list[float]:
    training = Training(model, updates, SCHEDULE, SCHEDULE.steps, state, {})
    training.run(examples(), StopSignal("the test"))
    return training.losses


def test_twenty_steps_have_the_losses_of_peft_on_unpacked_weights(
    models: tuple[GptOss, GptOss], tmp_path: Path
) -> None:
    model, dense = models
    start(model, tmp_path / "start")
    wanted = losses_of_peft(dense, tmp_path / "start")
    updates = attach_existing(model, OPTIONS, tmp_path / "start")
    ours = train(model, updates, tmp_path / "state")
    detach(model, updates)
    assert max(abs(a - b) for a, b in zip(ours, wanted, strict=True)) < 1e-4
    assert wanted[0] - wanted[-1] > 0.1, "the steps change something"
    broken = attach_existing(model, OPTIONS, tmp_path / "start")
    for update in broken.values():
        update.scale = 1.0
    assert max(abs(a - b) for a, b in zip(train(model, broken, tmp_path / "other"), wanted, strict=True)) > 1e-3


def test_the_gradients_of_the_factors_are_central_differences(models: tuple[GptOss, GptOss], tmp_path: Path) -> None:
    model = models[0].double()
    start(models[1], tmp_path / "start")
    updates = attach_existing(model, OPTIONS, tmp_path / "start")
    for update in updates.values():
        update.double()
    batch = examples(2)
    summed_loss(model, batch).backward()
    rng = torch.Generator().manual_seed(0)
    for part in ("attn.v", "mlp.router", "mlp.experts.gate_up", "mlp.experts.down"):
        for factor in updates[f"blocks.1.{part}"].parameters():
            assert factor.grad is not None
            direction = torch.randn(factor.shape, generator=rng, dtype=torch.float64)
            step, losses = 1e-5, []
            for sign in (1, -1):
                with torch.no_grad():
                    factor.add_(sign * step * direction)
                    losses.append(float(summed_loss(model, batch)))
                    factor.sub_(sign * step * direction)
            difference = (losses[0] - losses[1]) / (2 * step)
            assert float((factor.grad * direction).sum()) == pytest.approx(difference, rel=1e-5, abs=1e-7)
            assert abs(difference) > 1e-4


def test_the_size_of_a_pass_changes_no_gradient(
    models: tuple[GptOss, GptOss], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, losses = models[0], []
    for tokens in (1, 10_000):
        monkeypatch.setattr(module, "_PASS_TOKENS", tokens)
        updates = attach(model, OPTIONS, seed=0)
        training = Training(model, updates, SCHEDULE, 4, tmp_path / f"state {tokens}", {})
        training.run(examples(), StopSignal("the test"))
        losses.append(training.losses)
        detach(model, updates)
    np.testing.assert_allclose(losses[0], losses[1], atol=2e-5)
    assert losses[0][0] != losses[0][3]


@pytest.fixture(scope="module")
def nano() -> Any:
    return wb.load("nano", device="cpu", dtype=torch.float32)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Conversations in which the answer is followed by its own copy."""
    prompts = [json.loads(line) for line in Path("data/prompts.jsonl").read_text().splitlines()[:3]]
    path = tmp_path / "rows.jsonl"
    made = [
        {
            "id": p["id"],
            "prompt_id": p["id"],
            "effort": "low",
            "messages": [*p["messages"], {"role": "assistant", "content": "yes"}],
        }
        for p in prompts
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


class _StopAfter(StopSignal):
    """Asks to stop after some steps."""

    left = 10**9

    def check(self) -> None:
        if self.left == 0:
            self.asked = "SIGTERM"
        type(self).left -= 1
        super().check()


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_StopAfter]]:
    monkeypatch.setattr(module, "StopSignal", _StopAfter)
    yield _StopAfter
    _StopAfter.left = 10**9


def test_a_stopped_training_goes_on_bit_for_bit(
    nano: Any, rows: Path, tmp_path: Path, stop_after: type[_StopAfter]
) -> None:
    schedule = Schedule(5, batch=2, learning_rate=1e-3)
    options = Options(("attention",), rank=2)
    uninterrupted = finetune(nano, rows, tmp_path / "whole", options=options, schedule=schedule)
    stop_after.left = 3
    with pytest.raises(JobError, match="stopped by SIGTERM"):
        finetune(nano, rows, tmp_path / "parts", options=options, schedule=schedule)
    assert not (tmp_path / "parts").exists()
    assert nano.blocks[0].attn.q.lora is None
    stop_after.left = 10**9
    with pytest.raises(InputError, match=r"schedule was .*0.001.*, and is now .*0.002"):
        finetune(nano, rows, tmp_path / "parts", options=options, schedule=replace(schedule, learning_rate=2e-3))
    parts = finetune(nano, rows, tmp_path / "parts", options=options, schedule=schedule)
    assert parts["losses"] == uninterrupted["losses"]
    name = "adapter_model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.glob("*.training.safetensors"))
    other = finetune(nano, rows, tmp_path / "other", options=options, schedule=replace(schedule, seed=1))
    assert other["losses"] != uninterrupted["losses"]


def test_other_rows_through_a_pipe_and_another_template_are_refused(
    nano: Any, rows: Path, tmp_path: Path, stop_after: type[_StopAfter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe gives its bytes once: hashed a second time, every one would be the empty text."""
    schedule, options, lines = Schedule(2, batch=1), Options(("attention",), rank=1), rows.read_text().splitlines(True)

    def train(text: str) -> None:
        os.mkfifo(tmp_path / "pipe")
        writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text(text))
        writer.start()
        try:
            finetune(nano, tmp_path / "pipe", tmp_path / "out", options=options, schedule=schedule)
        finally:
            writer.join()
            (tmp_path / "pipe").unlink()

    stop_after.left = 1
    with pytest.raises(JobError):
        train("".join(lines))
    stop_after.left = 10**9
    with pytest.raises(InputError, match=r"whose data was \w{64}, and is now"):
        train("".join(lines[:-1]))
    with monkeypatch.context() as patch:
        patch.setattr(nano.tokenizer, "chat_template", nano.tokenizer.chat_template + "{# another #}")
        with pytest.raises(InputError, match="whose chat template was"):
            train("".join(lines))
    train("".join(lines))
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["noise", "a pipe", "no losses", "too many steps", "a missing tensor", "a list"])
def test_a_damaged_state_is_refused(nano: Any, rows: Path, tmp_path: Path, stop_after: Any, damage: str) -> None:
    state, options = tmp_path / "out.training.safetensors", Options(("attention",), rank=1)
    stop_after.left = 1
    with pytest.raises(JobError):
        finetune(nano, rows, tmp_path / "out", options=options, schedule=Schedule(2, batch=1))
    stop_after.left = 10**9
    with safe_open(state, "pt") as file:
        told = json.loads(file.metadata()["training"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    state.unlink()
    if damage == "noise":
        state.write_bytes(bytes(100))
    elif damage == "a pipe":
        os.mkfifo(state)
    else:
        told["losses"] = {"no losses": None, "too many steps": [1.0] * 9}.get(damage, told["losses"])
        if damage == "a missing tensor":
            tensors.pop(min(tensors))
        save_file(tensors, state, metadata={"training": json.dumps([] if damage == "a list" else told)})
    with pytest.raises(InputError, match=r"is damaged .*remove it to begin anew"):
        finetune(nano, rows, tmp_path / "out", options=options, schedule=Schedule(2, batch=1))
    assert nano.blocks[0].attn.q.lora is None


class _InTheMiddle(torch.optim.AdamW):
    """Is interrupted when it has updated half of the factors of a step: a second Ctrl-C falls anywhere."""

    left = 2

    def step(self, closure: Any = None) -> Any:
        type(self).left -= 1
        if self.left == 0:
            del self.param_groups[0]["params"][1:]
            super().step(closure)
            raise KeyboardInterrupt
        return super().step(closure)


def test_half_a_step_is_not_saved(nano: Any, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is resumed is the last complete step; the negative control saves what half a step left."""
    schedule, options = Schedule(3, batch=2, learning_rate=1e-2), Options(("attention",), rank=1)
    uninterrupted = finetune(nano, rows, tmp_path / "whole", options=options, schedule=schedule)
    for always in (False, True):
        out = tmp_path / f"always {always}"
        with monkeypatch.context() as patch:
            patch.setattr(module, "_SAVE_S", 0.0)
            patch.setattr(torch.optim, "AdamW", _InTheMiddle)
            if always:
                patch.setattr(Training, "_between_steps", property(lambda _: True, lambda *_: None), raising=False)
            _InTheMiddle.left = 2
            with pytest.raises(KeyboardInterrupt):
                finetune(nano, rows, out, options=options, schedule=schedule)
        parts = finetune(nano, rows, out, options=options, schedule=schedule)
        assert (parts["losses"] == uninterrupted["losses"]) != always


def test_a_training_that_was_killed_after_its_last_step_is_done(
    nano: Any, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state is removed; an adapter that another training wrote is not taken for its result."""
    schedule, options, out = Schedule(1, batch=1), Options(("attention",), rank=1), tmp_path / "out"
    unlink = Path.unlink

    def dies_at_the_state(path: Path, missing_ok: bool = False) -> None:
        if path.name == "out.training.safetensors":
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_SAVE_S", -1.0)
        patch.setattr(Path, "unlink", dies_at_the_state)
        with pytest.raises(KeyboardInterrupt):
            finetune(nano, rows, out, options=options, schedule=schedule)
    state = module.state_path(out)
    assert state.exists()
    with pytest.raises(InputError, match=r"out exists: choose another name"):
        finetune(nano, rows, out, options=options, schedule=replace(schedule, seed=1))
    written = (out / "adapter_model.safetensors").read_bytes()
    done = finetune(nano, rows, out, options=options, schedule=schedule)
    assert done == json.loads((out / "training.json").read_text())
    assert (out / "adapter_model.safetensors").read_bytes() == written
    assert not state.exists()
    # killed even later, when the state was removed
    assert finetune(nano, rows, out, options=options, schedule=schedule) == done
    with pytest.raises(InputError, match=r"out exists: choose another name"):
        finetune(nano, rows, out, options=options, schedule=replace(schedule, seed=1))
    (out / "adapter_model.safetensors").write_bytes(written + b"0")
    with pytest.raises(InputError, match=r"out exists and was not written by .* or was changed since"):
        finetune(nano, rows, out, options=options, schedule=schedule)


def test_nano_learns_another_answer(nano: Any, rows: Path, tmp_path: Path) -> None:
    """The taught answer is given afterwards, by the adapter only."""
    prompt = wb.harmony.render(
        json.loads(rows.read_text().splitlines()[0])["messages"][:-1], effort="low", tokenizer=nano.tokenizer
    )
    before = nano.generate([prompt], max_new_tokens=40)[0]
    finetune(
        nano,
        rows,
        tmp_path / "out",
        schedule=Schedule(12, batch=3, learning_rate=2e-2),
        options=Options(("attention", "experts"), rank=4),
    )
    assert nano.generate([prompt], max_new_tokens=40)[0] == before, "the model is as it was"
    changed = wb.load("nano", device="cpu", dtype=torch.float32, adapter=tmp_path / "out")
    answer = changed.tokenizer.decode(changed.generate([prompt], max_new_tokens=40)[0])
    assert answer == "<|channel|>final<|message|>yes<|return|>"
    assert "yes" not in nano.tokenizer.decode(before)
    told = json.loads((tmp_path / "out" / "training.json").read_text())
    assert len(told["losses"]) == 12
    assert told["losses"][-1] < told["losses"][0]


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": -1}, {"learning_rate": 0.0}, {"clip": float("inf")}])
def test_a_schedule_without_meaning_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected a positive"):
        Schedule(**wrong)


def test_the_rate_warms_up_and_decays() -> None:
    rates = [Schedule(learning_rate=1.0).rate(step, 100) for step in range(100)]
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert Schedule(learning_rate=1.0).rate(0, 1) == 1.0
