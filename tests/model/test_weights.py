"""The weights under TransformerLens' names are those of the pass."""

import pytest
import torch
from transformer_lens import SVDInterpreter

import workbench as wb
from workbench.errors import InputError
from workbench.model.transformer import GptOss


@pytest.fixture(scope="module")
def model() -> GptOss:
    return wb.load("nano", dtype=torch.float32, device="cpu")


def test_composition_scores_are_those_of_the_full_products(model: GptOss) -> None:
    written, gain = model.OV[0, 3].AB, model.blocks[2].ln1.weight
    qk, ov = model.W_Q[2, 1] @ model.W_K[2, 1].mT, model.W_V[2, 1] @ model.W_O[2, 1]
    wanted = {"Q": gain[:, None] * qk * gain, "K": gain[:, None] * qk.mT * gain, "V": gain[:, None] * ov}
    for mode, read in wanted.items():
        scores = model.all_composition_scores(mode)
        assert scores.shape == (4, 8, 4, 8)
        score = (written @ read).norm() / written.norm() / read.norm()
        torch.testing.assert_close(scores[0, 3, 2, 1], score, rtol=1e-4, atol=1e-5)
        assert not scores[2, :, 2].any()
        assert not scores[3, :, 1].any()
    without_gain = (written @ qk).norm() / written.norm() / qk.norm()  # negative control
    assert (model.all_composition_scores("Q")[0, 3, 2, 1] - without_gain).abs() > 1e-4
    with pytest.raises(InputError, match="expected 'Q', 'K' or 'V'"):
        model.all_composition_scores("q")


def test_parameters_by_name(model: GptOss) -> None:
    params = model.get_params()
    torch.testing.assert_close(params["blocks.1.attn.W_Q"], model.W_Q[1])
    assert params["blocks.0.mlp.router.W"].shape == (model.cfg.d_model, model.cfg.num_experts)
    assert not [name for name in params if "W_in" in name]
    vectors = SVDInterpreter(model).get_singular_vectors("OV", 1, 4, 0)
    assert vectors.shape == (model.cfg.d_vocab, 1, 4)
