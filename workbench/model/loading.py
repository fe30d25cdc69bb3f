"""From a checkpoint to a model that can be hooked: `load`."""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from workbench import harmony
from workbench.errors import InputError
from workbench.model.checkpoint import open_checkpoint, resolve
from workbench.model.lora import load_adapter
from workbench.model.transformer import GptOss


def load(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    revision: str | None = None,
    ignore_fields: Collection[str] = (),
    adapter: str | Path | None = None,
) -> GptOss:
    """The model in a folder of either published layout, the bundled one ("nano"), or a hub id.

    Weights stay memory-mapped and the experts packed: what is read is what is used. dtype float32 does all
    arithmetic in float32. device "auto" is a GPU where there is one. `adapter` is a PEFT folder with a LoRA for it.
    """
    folder = resolve(source, revision=revision)
    checkpoint = open_checkpoint(folder, ignore_fields=ignore_fields)
    tokenizer = harmony.tokenizer(folder)
    if tokenizer.d_vocab > checkpoint.cfg.d_vocab:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.d_vocab} ids, the model's vocabulary {checkpoint.cfg.d_vocab}: "
            "they do not belong together"
        )
    with torch.device("meta"):
        model = GptOss(checkpoint.cfg, packed=checkpoint.experts == "mxfp4", tokenizer=tokenizer, checkpoint=checkpoint)
    target = _device(device)

    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(target, dtype if tensor.is_floating_point() else tensor.dtype)

    model.load_state_dict({name: placed(tensor) for name, tensor in checkpoint.tensors.items()}, assign=True)
    model.requires_grad_(False).eval()
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r} is unknown: use auto, cpu, cuda, cuda:0 or mps") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r}: this torch sees no GPU; use device='cpu' or install a CUDA build of torch")
    return device
