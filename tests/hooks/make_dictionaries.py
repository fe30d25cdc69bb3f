"""Made the folders in tests/hooks/dictionaries with dictionary_learning 0.1.0: small autoencoders and their outputs.

The library's own `trainSAE` trains each for a few steps on random activations and writes config.json and ae.pt. The
release requires an older nnsight than this project, and wandb; neither is used to train on tensors, so empty modules
take their names here. It ran in an environment of its own:
    pip install torch safetensors datasets einops tqdm zstandard && pip install --no-deps dictionary-learning==0.1.0
    python tests/hooks/make_dictionaries.py
"""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

for _name in ("nnsight", "wandb"):
    sys.modules[_name] = ModuleType(_name)
sys.modules["nnsight"].LanguageModel = object  # type: ignore[attr-defined]

HERE = Path(__file__).parent / "dictionaries"
SIZES = {"activation_dim": 32, "dict_size": 24}
STEPS, BATCH = 40, 64
TRAINERS = {
    "batch_topk": ("batch_top_k", "BatchTopKTrainer", {"k": 4, "threshold_start_step": 5, "warmup_steps": 2}),
    "topk": ("top_k", "TopKTrainer", {"k": 5, "threshold_start_step": 5, "warmup_steps": 2}),
    "jumprelu": ("jumprelu", "JumpReluTrainer", {"target_l0": 5.0, "warmup_steps": 2, "sparsity_warmup_steps": 5}),
    "matryoshka": (
        "matryoshka_batch_top_k",
        "MatryoshkaBatchTopKTrainer",
        {"k": 4, "threshold_start_step": 5, "warmup_steps": 2, "group_fractions": [0.25, 0.75]},
    ),
    "gated": ("gdm", "GatedSAETrainer", {"warmup_steps": 2, "sparsity_warmup_steps": 5}),
    "standard": ("standard", "StandardTrainer", {"warmup_steps": 2, "sparsity_warmup_steps": 5}),
    "standard_april": ("standard", "StandardTrainerAprilUpdate", {"warmup_steps": 2, "sparsity_warmup_steps": 5}),
}


class Activations:
    """Random activations, and the description of a buffer as the library writes it."""

    config: ClassVar[dict[str, object]] = {
        "d_submodule": 32,
        "io": "out",
        "n_ctxs": 64,
        "ctx_len": 128,
        "device": "cpu",
    }

    def __init__(self, seed: int) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.directions = torch.randn(16, 32, generator=self.rng)

    def batch(self, rows: int) -> torch.Tensor:
        """Return rows [rows 32] that are sparse sums of 16 directions, and a mean that is not zero."""
        strengths = torch.rand(rows, 16, generator=self.rng) * (torch.rand(rows, 16, generator=self.rng) < 0.2)
        return 3 * strengths @ self.directions + 0.5

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            yield self.batch(BATCH)


def train(name: str, seed: int) -> None:
    """Write one folder, and what the library computes with it."""
    module, trainer, options = TRAINERS[name]
    library = importlib.import_module(f"dictionary_learning.trainers.{module}")
    config: dict[str, Any] = {
        "trainer": getattr(library, trainer),
        "steps": STEPS,
        "layer": 1,
        "lm_name": "tiny",
        "device": "cpu",
        "seed": seed,
        "lr": 1e-2,
        "wandb_name": name,
        "submodule_name": "resid_post_layer_1",
        **SIZES,
        **options,
    }
    data = Activations(seed)
    importlib.import_module("dictionary_learning.training").trainSAE(
        data, [config], STEPS, save_dir=str(HERE / name), normalize_activations=True, device="cpu"
    )
    folder = HERE / name / "trainer_0"
    for path in folder.iterdir():
        path.replace(HERE / name / path.name)
    folder.rmdir()
    dictionary, _ = importlib.import_module("dictionary_learning.utils").load_dictionary(str(HERE / name), "cpu")
    x = data.batch(10)
    with torch.no_grad():
        features = dictionary.encode(x)
        out = {"x": x, "features": features, "decoded": dictionary.decode(features)}
    save_file({key: value.contiguous() for key, value in out.items()}, HERE / name / "outputs.safetensors")
    active = (features > 0).float().sum(-1)
    print(name, json.dumps({"active a row": active.tolist()}), "threshold", getattr(dictionary, "threshold", None))


def main() -> None:
    """Write every folder."""
    HERE.mkdir(exist_ok=True)
    for seed, name in enumerate(TRAINERS):
        train(name, seed)


if __name__ == "__main__":
    main()
