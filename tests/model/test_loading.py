"""What fits is loaded where it belongs, what does not fit is refused before a weight is read; devices take turns."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.model.conftest import BASE
from tests.model.fake_gpus import Machine
from workbench.errors import InputError
from workbench.hooks.names import hook_points
from workbench.kernels import mxfp4
from workbench.model import load, memory
from workbench.model.export import save_random
from workbench.model.lazy_tensors import Tensors
from workbench.model.transformer import GptOss

CFG = replace(BASE, n_layers=5, windows=(16, None, 16, None, 16), d_vocab=72)
TWO = "cuda:0, cuda:1"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("random") / "model", CFG)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    there = Machine()
    there.pretend(monkeypatch, devices=7, memory=10**9)
    mxfp4._table.cache_clear()
    with there:
        yield there
    mxfp4._table.cache_clear()  # nothing of the machine outlives it


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(CFG.d_vocab, (2, 37), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def spread(machine: Machine, checkpoint: Path) -> GptOss:
    return load(checkpoint, device=TWO, dtype=torch.float32)


@pytest.fixture
def on_one_device(machine: Machine, checkpoint: Path) -> GptOss:
    return load(checkpoint, device="cuda:0", dtype=torch.float32)


@pytest.fixture
def no_weight_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Tensor, *to: object) -> Tensor:
        raise AssertionError(f"{tuple(self.shape)} was moved")

    monkeypatch.setattr(Tensor, "to", refuse)


def room(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(memory, "free", lambda device: size)


def test_the_meta_device_reads_no_weight(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(Tensors, "__getitem__", lambda self, name: read.append(name) or torch.zeros(1))
    model = load(checkpoint, device="meta")
    assert set(read) <= {"embed.weight"}  # the check of types in tests looks at the first item of a mapping
    dtypes = {tensor.dtype for tensor in model.state_dict().values()}
    assert (dtypes, model.device.type) == ({torch.bfloat16, torch.uint8}, "meta")


@pytest.mark.usefixtures("no_weight_is_moved")
def test_weights_that_do_not_fit_are_refused_before_one_is_moved(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(memory.weights(CFG).values())
    room(monkeypatch, size - 1)
    with pytest.raises(InputError, match="MB of cpu; they need a device with more memory"):
        load(checkpoint, device="cpu")
    room(monkeypatch, size)
    with pytest.raises(AssertionError, match="was moved"):
        load(checkpoint, device="cpu")


@pytest.mark.usefixtures("machine")
def test_two_devices_hold_what_one_cannot(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room(monkeypatch, sum(memory.weights(CFG).values()) * 2 // 3)
    with pytest.raises(InputError, match="of cuda:0; they need 2 devices"):
        load(checkpoint, device="cuda:0")
    assert len(set(load(checkpoint, device=TWO).devices)) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toaster", "toaster"),
        ("cpu:0,toaster", "toaster"),
        ("cpu:0,", "unknown"),
        ("cpu:0,cpu:0", "twice"),
        ("cuda:0,cuda:7", "this machine has cuda:0 to cuda:6"),
    ],
)
@pytest.mark.usefixtures("machine")
def test_devices_that_make_no_sense_are_refused(name: str, message: str, checkpoint: Path) -> None:
    with pytest.raises(InputError, match=message):
        load(checkpoint, device=name)


def test_a_dtype_may_be_given_by_name(checkpoint: Path) -> None:
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16), (torch.float32, torch.float32)):
        assert load(checkpoint, device="cpu", dtype=name).dtype == dtype
    for wrong in ("int8", "fp8", torch.int8, "load"):
        with pytest.raises(InputError, match=f"dtype={wrong!r}: expected one of floating point"):
            load(checkpoint, dtype=wrong)


@pytest.mark.parametrize(("size", "used"), [(10**12, {0}), (10**6, {0, 1, 2})])
@pytest.mark.usefixtures("machine")
def test_auto_takes_all_gpus_where_one_is_too_small(
    size: int, used: set[int], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    room(monkeypatch, size)
    assert {device.index for device in load(checkpoint).devices} == used


def test_every_tensor_is_on_its_stage(spread: GptOss, machine: Machine) -> None:
    weights = memory.weights(CFG, dtype=torch.float32)
    places = memory.spread(weights, 2)
    assert set(places.values()) == {0, 1}
    held = {torch.device("cuda", 0): 0, torch.device("cuda", 1): 0}
    for name, tensor in spread.state_dict().items():
        assert machine.of(tensor).index == places[memory.part_of(name)], name
        held[machine.of(tensor)] += tensor.nbytes
    assert list(held.values()) == memory.stages(weights, 2)
    assert spread.device == torch.device("cuda", 0)
    assert spread.devices == [torch.device("cuda", places[f"blocks.{layer}"]) for layer in range(CFG.n_layers)]


@torch.no_grad()
def test_the_numbers_are_the_same_and_one_tensor_of_the_stream_crosses(
    spread: GptOss, on_one_device: GptOss, machine: Machine, tokens: Tensor
) -> None:
    got = spread(tokens.to(spread.device))
    assert machine.of(got) == torch.device("cuda", 1)
    half = CFG.d_head // 2
    # the residual stream, then the positions and their rotations
    assert machine.crossings == [(2, 37, CFG.d_model), (2, 37), (2, 37, half), (2, 37, half)]
    assert torch.equal(got.cpu(), on_one_device(tokens.to(on_one_device.device)).cpu())


@torch.no_grad()
def test_kernels_are_launched_on_the_device_of_their_layer(
    spread: GptOss, machine: Machine, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton takes the current device, whatever device its tensors are on."""
    current: list[torch.device] = []

    def device_of(tensor: Tensor) -> nullcontext[None]:
        current.append(machine.of(tensor))
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    spread(tokens.to(spread.device))
    assert current == spread.devices
    assert len(set(current)) == 2


@torch.no_grad()
def test_hooks_see_tensors_where_their_layer_is(spread: GptOss, machine: Machine, tokens: Tensor) -> None:
    seen: dict[str, torch.device] = {}
    spread.run_with_hooks(
        tokens.to(spread.device),
        fwd_hooks=[(lambda name: True, lambda t, hook: seen.update({hook.name: machine.of(t)}))],
    )
    assert set(seen) == set(hook_points(CFG.n_layers))
    for name, device in seen.items():
        first, last = torch.device("cuda", 0), torch.device("cuda", 1)
        layer = spread.devices[int(name.split(".")[1])] if name.startswith("blocks.") else None
        assert device == (layer or (first if name == "hook_embed" else last)), name


def test_generation_keeps_each_layer_s_cache_with_it(spread: GptOss, on_one_device: GptOss) -> None:
    prompts = [[5, 9, 2], list(range(40)), [7]]
    stop = range(12)
    got = spread.generate(prompts, max_new_tokens=6, stop=stop)
    assert got == on_one_device.generate(prompts, max_new_tokens=6, stop=stop)
    assert len({len(row) for row in got}) > 1, "the rows should stop at different times, or nothing is selected"


def test_packed_sequences_with_an_embedding_that_has_a_device_to_itself(
    machine: Machine, checkpoint: Path, on_one_device: GptOss, tokens: Tensor
) -> None:
    row = tokens.flatten()[None]
    many = load(checkpoint, device=",".join(f"cuda:{i}" for i in range(7)), dtype=torch.float32)
    with torch.no_grad():
        got = many(row.to(many.device), packed=[40, 34])
    assert len({*many.devices, many.device, machine.of(got)}) > 4
    with torch.no_grad():
        assert torch.equal(got.cpu(), on_one_device(row.to(on_one_device.device), packed=[40, 34]).cpu())


@torch.no_grad()
def test_an_adapter_lies_beside_what_it_adapts(
    checkpoint: Path, machine: Machine, on_one_device: GptOss, tokens: Tensor, tmp_path: Path
) -> None:
    rng = torch.Generator().manual_seed(1)
    where = "base_model.model.model.layers.4.self_attn.q_proj"
    sizes = {"A": (2, CFG.d_model), "B": (CFG.n_heads * CFG.d_head, 2)}
    save_file(
        {f"{where}.lora_{f}.weight": torch.randn(size, generator=rng) for f, size in sizes.items()},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    apart = load(checkpoint, device=TWO, dtype=torch.float32, adapter=tmp_path)
    adapted = load(checkpoint, device="cuda:0", dtype=torch.float32, adapter=tmp_path)
    assert machine.of(apart.get_parameter("blocks.4.attn.q.lora.a")) == torch.device("cuda", 1)
    assert load(checkpoint, device="meta", adapter=tmp_path).adapter is not None  # the parent of workers
    got = apart(tokens.to(apart.device)).cpu()
    assert torch.equal(got, adapted(tokens.to(adapted.device)).cpu())
    assert not torch.equal(got, on_one_device(tokens.to(on_one_device.device)).cpu())


@torch.no_grad()
def test_the_machine_refuses_tensors_that_were_not_handed_over(
    spread: GptOss, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GptOss, "devices", [torch.device("cuda", 0)] * CFG.n_layers)
    with pytest.raises(RuntimeError, match=r"tensors on \['cuda:0', 'cuda:1'\]"):
        spread(tokens.to(spread.device))


def test_a_gpu_older_than_ampere_is_refused_before_a_weight_is_moved(
    machine: Machine, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index else (8, 0))
    load(checkpoint, device="cuda:0")
    with pytest.raises(InputError, match=r"'cuda:1' has compute capability 7.5; the kernels need 8.0 or newer"):
        load(checkpoint, device=TWO)


def test_a_model_on_meta_has_shapes_and_no_weights(machine: Machine, checkpoint: Path) -> None:
    model = load(checkpoint, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.cfg == CFG
