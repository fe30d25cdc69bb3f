"""Jacobian lenses: a linear model's known Jacobian is found, files of other tools are read, and others are refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.conftest import DATA
from tests.model.conftest import BASE, random_model
from workbench import harmony
from workbench.errors import InputError
from workbench.experiments import jacobians
from workbench.experiments.from_run import transcripts
from workbench.experiments.jacobians import JacobianLens, fit_jacobian_lens, fit_jacobian_lenses
from workbench.experiments.lens import TunedLens, logit_lens
from workbench.harmony.token_sets import token_set
from workbench.harmony.transcripts import Transcript
from workbench.model.transformer import GptOss

WIDE = 1e12  # an epsilon beside which the stream is nothing: the norms become linear
X = torch.randint(BASE.d_vocab, (2, 12), generator=torch.Generator().manual_seed(1))
SKIP = 2


def linear_model(**changed: Any) -> GptOss:
    """Two layers whose second attends to all earlier tokens alike, and whose experts write nothing."""
    cfg = replace(BASE, **({"d_model": 32, "n_layers": 2, "windows": (16, None), "eps": WIDE} | changed))
    model = random_model(cfg).double().requires_grad_(False)
    for block in model.blocks:
        block.ln1.weight.fill_(WIDE**0.5)
        for part in (block.attn.q, block.attn.k):
            part.weight.zero_()
            part.bias.zero_()
        block.attn.sinks.fill_(-torch.inf)
        for part in (block.mlp.experts.down.weight, block.mlp.experts.down.bias):
            part.zero_()
    return model


def attention_map(model: GptOss) -> Tensor:
    """What the second layer writes of the mean of the streams that it attends to."""
    attn = model.blocks[1].attn
    return torch.einsum("hmd,hdn->nm", attn.W_V, attn.W_O)


def mean_of_sums(sources: list[int], targets: list[int]) -> float:
    """Mean over sources of the summed attention that later targets pay to them."""
    return float(np.mean([sum(1 / (t + 1) for t in targets if t >= s) for s in sources]))


def test_the_known_jacobian_of_a_linear_model_is_found() -> None:
    """Token t' writes A · mean of the streams up to t', so that J is 1 + c · A with c from the positions alone."""
    model, valid = linear_model(), list(range(SKIP, 11))
    A = attention_map(model)
    lens = fit_jacobian_lens(model, X, skip_first=SKIP, batch=5)
    assert (lens.layers, lens.n_prompts) == ([0], 2)
    expected = torch.eye(32) + mean_of_sums(valid, valid) * A
    torch.testing.assert_close(lens.J[0].double(), expected, atol=1e-6, rtol=1e-5)
    # Negative controls: without the effects on later tokens, and with the targets averaged.
    for wrong in (np.mean([1 / (t + 1) for t in valid]), mean_of_sums(valid, valid) / len(valid)):
        assert (lens.J[0].double() - torch.eye(32) - wrong * A).abs().max() > 0.1 * A.abs().max()


def test_the_jacobian_of_a_channel_has_its_tokens_as_sources_and_all_later_ones_as_targets() -> None:
    tokenizer = harmony.tokenizer(wb.load("nano", device="meta").checkpoint.path)
    model = linear_model(d_vocab=tokenizer.d_vocab)
    model.tokenizer = tokenizer
    row = next(r for r in transcripts(wb.open_run(DATA / "demo.zarr")) if r.effort == "medium")
    result = fit_jacobian_lenses(model, [row], skip_first=SKIP, batch=32)
    valid = list(range(SKIP, len(row.tokens) - 1))
    A = attention_map(model)
    for channel in ("analysis", "final"):
        mask = token_set(channel=channel, tokenizer=tokenizer)(row.tokens.astype(np.int64))
        own = [t for t in valid if mask[t]]
        expected = torch.eye(32) + mean_of_sums(own, valid) * A
        torch.testing.assert_close(result[f"{channel}, medium"].J[0].double(), expected, atol=1e-6, rtol=1e-5)
        of_channel_alone = torch.eye(32) + mean_of_sums(own, own) * A
        same = torch.allclose(result[f"{channel}, medium"].J[0].double(), of_channel_alone, atol=1e-3)
        assert same == (channel == "final"), "the analysis has later targets, the final message has none"
    everything = torch.eye(32) + mean_of_sums(valid, valid) * A
    torch.testing.assert_close(result["all"].J[0].double(), everything, atol=1e-6, rtol=1e-5)
    assert {"analysis, medium", "final, medium", "all"} <= set(result)


def test_the_jacobian_of_a_nonlinear_model_is_that_of_automatic_differentiation(exact: GptOss) -> None:
    tokens = X[:1, :6]
    lens = fit_jacobian_lens(exact, tokens, skip_first=SKIP, batch=10)
    assert lens.layers == [0, 1]
    start = exact.residual(tokens, layers=range(1))
    derivative = torch.autograd.functional.jacobian(
        lambda stream: exact.residual(tokens, stream=stream, layers=range(1, 3)), start
    )[0, :, :, 0]
    valid = range(SKIP, 5)
    expected = sum(derivative[t, :, s] for t in valid for s in valid) / len(valid)
    torch.testing.assert_close(lens.J[0].double(), expected, atol=1e-4, rtol=1e-5)
    transposed = lens.J[0].mT.double()
    assert (transposed - expected).abs().max() > 0.1
    assert not any(p.requires_grad for p in exact.parameters())


def test_prompts_weigh_alike_and_lenses_of_parts_merge_to_the_lens_of_all(exact: GptOss) -> None:
    parts = [fit_jacobian_lens(exact, X[i : i + 1], n_real=[n], skip_first=SKIP) for i, n in ((0, 12), (1, 7))]
    both = fit_jacobian_lens(exact, X, n_real=[12, 7], skip_first=SKIP)
    merged = JacobianLens.merge(parts)
    assert merged.n_prompts == 2
    for layer in both.layers:
        torch.testing.assert_close(merged.J[layer], both.J[layer], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(both.J[layer], (parts[0].J[layer] + parts[1].J[layer]) / 2, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="different layers"):
        JacobianLens.merge([parts[0], JacobianLens({0: parts[0].J[0]}, 1)])
    with pytest.raises(InputError, match="each needs at least one"):
        JacobianLens.merge([replace(parts[0], n_prompts=0)])


def test_a_reading_is_the_norm_and_unembedding_of_the_mapped_stream(exact: GptOss) -> None:
    rng = torch.Generator().manual_seed(3)
    lens = JacobianLens({1: torch.randn(64, 64, generator=rng)}, 1)
    result = logit_lens(exact, X, of=7, jacobian=lens)
    assert (result.attrs["lens"], result["layer"].values.tolist()) == ("jacobian", [1, 2])
    stream = exact.run_with_cache(X)[1]["blocks.1.hook_resid_post"].flatten(0, 1)

    def read(x: Tensor) -> np.ndarray:
        scale = (x.square().mean(-1, keepdim=True) + BASE.eps).sqrt()
        logits = (x / scale * exact.ln_final.weight) @ exact.unembed.weight.mT
        return np.asarray(logits[:, 7])

    np.testing.assert_allclose(result["logit"].isel(depth=0), read(stream @ lens.J[1].double().mT), atol=1e-8)
    assert not np.allclose(result["logit"].isel(depth=0), read(stream @ lens.J[1].double()), atol=1e-2)
    plain = logit_lens(exact, X, of=7)
    np.testing.assert_array_equal(result["logit"].isel(depth=-1), plain["logit"].isel(depth=-1))
    same = logit_lens(exact, X, of=7, jacobian=JacobianLens({0: torch.eye(64)}, 1))
    np.testing.assert_allclose(same["kl"].isel(depth=0), plain["kl"].isel(depth=2), atol=1e-6)
    with pytest.raises(InputError, match="give one of them"):
        logit_lens(exact, X, of=7, jacobian=lens, tuned=TunedLens.identity(exact))


def test_files_of_the_reference_implementation_and_of_transformer_lens_are_read_and_written(
    exact: GptOss, tmp_path: Path
) -> None:
    rng = torch.Generator().manual_seed(3)
    J = {layer: torch.randn(64, 64, generator=rng).half() for layer in (0, 1)}
    path = tmp_path / "lens.pt"
    torch.save({"J": J, "n_prompts": 10, "source_layers": [0, 1], "d_model": 64}, path)
    lens = JacobianLens.load(path, exact)
    assert (lens.n_prompts, lens.layers, lens.J[1].dtype) == (10, [0, 1], torch.float32)
    assert all(torch.equal(lens.J[layer], J[layer].float()) for layer in J)
    torch.save({"jacobian_sum": {0: J[0].float() * 4}, "n_done": 4, "next_idx": 5, "target_layer": 2}, path)
    assert torch.equal(JacobianLens.load(path, exact).J[0], J[0].float())

    written = tmp_path / "own.pt"
    lens.save(written)
    lens.save(written)  # a lens is replaced, and nothing else
    content = torch.load(written, weights_only=True)
    assert set(content) == {"J", "n_prompts", "source_layers", "d_model"}
    assert all(torch.equal(content["J"][layer], J[layer]) for layer in J)
    theirs = pytest.importorskip("transformer_lens.tools.analysis.jacobian_lens").JacobianLens.load(str(written))
    assert torch.equal(theirs.jacobians[1], lens.J[1])
    theirs.save(str(path))
    assert torch.equal(JacobianLens.load(path, exact).J[1], lens.J[1])
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(InputError, match="exists and was not written by"):
        lens.save(tmp_path / "mine")


EYE = torch.eye(64)
WRONG = {
    "no lens": ({"weights": EYE}, "is not a Jacobian lens"),
    "a list": ([EYE], "is not a Jacobian lens"),
    "no matrices": ({"J": {}}, "expected a matrix for each layer"),
    "another width": ({"J": {0: torch.eye(32)}}, r"layer 0 is \[32, 32\], this model needs \[64, 64\]"),
    "more layers": ({"J": {7: EYE}}, "has layer 7, this model has layers 0 to 2"),
    "not finite": ({"J": {0: EYE * torch.inf}}, "not of finite"),
    "integers": ({"J": {0: EYE.int()}}, "not of finite floating-point"),
    "another target": ({"J": {0: EYE}, "metadata": {"target_layer": 1}}, "fitted to layer 1"),
    "listed otherwise": ({"J": {0: EYE}, "source_layers": [0, 1]}, "the file is damaged"),
    "no prompts": ({"jacobian_sum": {0: EYE}, "n_done": 0}, "number of prompts is 0"),
    "prompts as text": ({"J": {0: EYE}, "n_prompts": "many"}, "number of prompts is 'many'"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_another_file_is_refused_in_one_line(exact: GptOss, tmp_path: Path, case: str) -> None:
    content, message = WRONG[case]
    torch.save(content, tmp_path / "lens.pt")
    with pytest.raises(InputError, match=message) as caught:
        JacobianLens.load(tmp_path / "lens.pt", exact)
    assert "\n" not in str(caught.value)


def test_a_fit_that_cannot_be_made_is_refused(exact: GptOss) -> None:
    with pytest.raises(InputError, match="no sequence has a source token after the first 16"):
        fit_jacobian_lens(exact, X)
    for layers in ([2], [-1], []):
        with pytest.raises(InputError, match="expected layers from 0 to 1"):
            fit_jacobian_lens(exact, X, layers=layers, skip_first=SKIP)
    with pytest.raises(InputError, match="batch=0"):
        fit_jacobian_lens(exact, X, batch=0, skip_first=SKIP)
    row = Transcript(id="a", prompt_id="a", tokens=np.arange(12, dtype=np.uint32), n_prompt=3, effort="low")
    with pytest.raises(InputError, match="expected 'channel', 'effort'"):
        fit_jacobian_lenses(exact, [row], by=["task"])
    assert jacobians.group_masks(exact, replace(row, effort=""), ["effort"]).keys() == {"unknown effort"}
