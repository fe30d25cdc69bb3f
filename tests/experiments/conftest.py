"""Random models in both precisions, and nano; shapes in signatures are checked here too."""

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook
from torch import Tensor

from tests.conftest import CHECK, CHECKED_EXPERIMENTS, DATA

install_import_hook([f"workbench.experiments.{name}" for name in CHECKED_EXPERIMENTS], CHECK)

import workbench as wb  # noqa: E402
from tests.model.conftest import BASE, random_model  # noqa: E402
from workbench.experiments.from_run import transcripts  # noqa: E402
from workbench.model.transformer import GptOss  # noqa: E402

MAKE = {
    "random, float64": lambda: random_model(BASE).double(),
    "random, float32": lambda: random_model(BASE),
    "nano, float32": lambda: wb.load("nano", dtype=torch.float32),
    "nano, bfloat16": lambda: wb.load("nano", dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def nano() -> GptOss:
    return wb.load("nano", dtype=torch.float32)


@pytest.fixture(scope="session")
def models() -> dict[str, GptOss]:
    return {name: make().requires_grad_(False) for name, make in MAKE.items()}


@pytest.fixture(scope="session")
def exact(models: dict[str, GptOss]) -> GptOss:
    return models["random, float64"]


@pytest.fixture(scope="session")
def generated() -> tuple[Tensor, list[int]]:
    """What nano said: sequences of unequal length, padded on the right, and their lengths."""
    rows = transcripts(wb.open_run(DATA / "demo.zarr"), range(0, 60, 2))
    parts = [torch.from_numpy(np.asarray(row.tokens)).long() for row in rows]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), [len(part) for part in parts]
