"""The small model whose activations the dictionaries of these tests decompose."""

from dataclasses import replace

import pytest
import torch

from tests.model.conftest import BASE, random_model
from workbench.model.transformer import GptOss

CFG = replace(BASE, d_model=32, n_heads=4, n_key_value_heads=2, d_head=8, d_mlp=32, n_layers=2, windows=(16, None))
X = torch.randint(CFG.d_vocab, (2, 20), generator=torch.Generator().manual_seed(1))
RESID = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model() -> GptOss:
    return random_model(CFG).requires_grad_(False)
