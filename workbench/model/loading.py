"""Load a checkpoint as a model with hooks, on one device or spread over several."""

import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels import cpu
from workbench.model import memory
from workbench.model.checkpoint import open_checkpoint, resolve
from workbench.model.config import Config
from workbench.model.lazy_tensors import LazyTensor
from workbench.model.lora import load_adapter
from workbench.model.transformer import GptOss

log = logging.getLogger("workbench.model")
_OLDEST_GPU = (8, 0)  # bfloat16 products and asynchronous copies, which the Triton kernels are compiled with
_CHECKED_BYTES = 2_000_000_000  # weights of larger checkpoints are checked when logits are not finite
_SHORT_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16", "fp64": "float64"}
_PASS_TOKENS = 4096  # "auto" leaves memory on a GPU for a forward pass of this many tokens


def load(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | str = torch.bfloat16,
    revision: str | None = None,
    ignore_fields: Collection[str] = (),
    adapter: str | Path | None = None,
) -> GptOss:
    """Return the model in a folder or GGUF file, the bundled one ("nano"), one of Ollama's, or of a hub id.

    Weights stay memory-mapped and the experts packed, in GGUF files too: what is read is what is used. A GPU gets
    tensor by tensor, and none of them before all are known to fit. dtype float32 (or "float32") does all arithmetic in
    float32. device
    "auto" is a GPU where there is one, or all of them where one is too small. Several devices, as in "cuda:0,cuda:1",
    take contiguous layers in turn. `adapter` is a PEFT folder with a LoRA for it. device "meta" has shapes and no
    weights: for a job whose workers load the model themselves.

    Raises:
        InputError: the checkpoint is not valid, the dtype is not one of floating point, or the device is unknown, too
            small, or a GPU older than Ampere.
    """
    dtype = _floating_point(dtype)
    folder = resolve(source, revision=revision)
    checkpoint = open_checkpoint(folder, ignore_fields=ignore_fields)
    for note in checkpoint.notes:
        log.warning("%s: %s", checkpoint.path, note)
    tokenizer = checkpoint.tokenizer()
    if tokenizer.d_vocab > checkpoint.cfg.d_vocab:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.d_vocab} ids, the model's vocabulary {checkpoint.cfg.d_vocab}: "
            "they are not of one model: give the tokenizer of the checkpoint"
        )
    with torch.device("meta"):
        model = GptOss(checkpoint.cfg, packed=checkpoint.experts == "mxfp4", tokenizer=tokenizer, checkpoint=checkpoint)
    parts = memory.weights(checkpoint.cfg, checkpoint.experts, dtype)
    places = _places(device, checkpoint.cfg, parts, dtype)
    for used in dict.fromkeys(places.values()):
        _check_capability(used)
    _check_room(folder, parts, places)
    if device != "meta" and sum(parts.values()) <= _CHECKED_BYTES:
        checkpoint.check_values()

    def placed(name: str, tensor: LazyTensor) -> Tensor:
        return tensor.read_as(dtype).to(places[memory.part_of(name)])

    if device == "meta":  # no weight is read: reading may mean converting
        model.to(dtype)
    else:
        entries = dict(checkpoint.tensors.entries)
        for name in _map_experts(model, entries, places):
            del entries[name]
        model.load_state_dict({name: placed(name, tensor) for name, tensor in entries.items()}, assign=True)
    model.requires_grad_(False).eval()
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def _floating_point(dtype: torch.dtype | str) -> torch.dtype:
    """Return a dtype, which may be given by name, as "float32" or "bf16"."""
    value = getattr(torch, _SHORT_DTYPES.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise InputError(f"dtype={dtype!r}: expected one of floating point, such as torch.float32 or 'bfloat16'")
    return value


def _map_experts(model: GptOss, entries: Mapping[str, LazyTensor], places: Mapping[str, torch.device]) -> Iterator[str]:
    """Let the CPU's layers use packed experts as the file holds them; yield the names of their tensors."""
    if cpu.unavailable():  # every pass would reorder the bits by slower code
        return
    for name, tensor in list(entries.items()):
        if tensor.in_place is not None and places[memory.part_of(name)].type == "cpu":
            if name.endswith(".blocks"):
                model.get_submodule(name.rpartition(".")[0]).read_in_place(tensor.in_place())
            yield name


def _places(name: str, cfg: Config, parts: Mapping[str, int], dtype: torch.dtype) -> dict[str, torch.device]:
    """Return the device of every part of the model."""
    devices = _auto(cfg, parts, dtype) if name == "auto" else [_device(one.strip()) for one in name.split(",")]
    if len(set(devices)) < len(devices):
        raise InputError(f"device {name!r} lists a device twice: list each device once")
    return {part: devices[place] for part, place in memory.spread(parts, len(devices)).items()}


def _auto(cfg: Config, parts: Mapping[str, int], dtype: torch.dtype) -> list[torch.device]:
    """Return the first GPU where the model and a pass fit on it, otherwise all GPUs, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return [torch.device("cpu")]
    one = torch.device("cuda")
    working = max(memory.activations(cfg, _PASS_TOKENS, dtype=dtype).values()) + memory.CUBLAS_WORKSPACE
    fits = sum(parts.values()) + working <= memory.free(one)
    return [one] if fits else [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def _device(name: str) -> torch.device:
    """Return the device of a name, which must exist on this machine."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(
            f"device {name!r} is unknown: use auto, cpu, cuda, mps, cuda:0, or several as in cuda:0,cuda:1"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device {name!r}: torch finds no GPU on this machine; use device='cpu' or install a CUDA build of torch"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r}: this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return device


def _check_capability(device: torch.device) -> None:
    """Refuse an NVIDIA GPU for which the kernels are not compiled, before any weight is moved to it."""
    if device.type != "cuda" or torch.version.hip:
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_GPU:
        raise InputError(
            f"device '{device}' has compute capability {capability[0]}.{capability[1]}; the kernels need "
            f"{_OLDEST_GPU[0]}.{_OLDEST_GPU[1]} or newer (Ampere, Hopper, Blackwell): use device='cpu' or another GPU"
        )


def _check_room(folder: Path, parts: Mapping[str, int], places: Mapping[str, torch.device]) -> None:
    """Refuse weights that a device cannot hold, with the number of its like that could."""
    for device in dict.fromkeys(places.values()):
        if device.type == "meta":
            continue
        needed = sum(size for part, size in parts.items() if places[part] == device)
        if needed <= (room := memory.free(device)):
            continue
        enough = memory.devices_for(parts, room) if device.type == "cuda" else None
        remedy = "a device with more memory" if enough is None else f"{enough} devices of this size"
        raise InputError(
            f"{folder}: {memory.human(needed)} of weights do not fit in the {memory.human(room)} of {device}; they "
            "need "
            f"{remedy}, see `workbench info`"
        )
