"""Vectors and features steer as the library does; other files are refused, and a recipe names no path."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import workbench as wb
from workbench.errors import InputError
from workbench.hooks.interventions import applied
from workbench.model.transformer import GptOss
from workbench.research.recipe import Intervention, Recipe, Scope
from workbench.research.steering_sources import SteeringSources, read_sources, read_vector

LAYER = 2


@pytest.fixture(scope="module")
def nano() -> GptOss:
    model: GptOss = wb.load("nano", dtype=torch.float32)
    return model


@pytest.fixture(scope="module")
def vector(nano: GptOss) -> torch.Tensor:
    return torch.randn(nano.cfg.d_model, generator=torch.Generator().manual_seed(1))


def write_sae(folder: Path, d_in: int, **more: object) -> torch.Tensor:
    """Write an SAE of three features in SAELens' format; return its decoder."""
    made = torch.Generator().manual_seed(2)
    decoder = torch.randn(3, d_in, generator=made)
    weights = {"W_enc": decoder.mT.contiguous(), "W_dec": decoder, "b_enc": torch.zeros(3), "b_dec": torch.zeros(d_in)}
    folder.mkdir()
    save_file(weights, folder / "sae_weights.safetensors")
    cfg = {"architecture": "standard", "d_in": d_in, "d_sae": 3, "dtype": "float32"}
    cfg |= {"hook_name": f"blocks.{LAYER}.hook_resid_post", **more}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return decoder


def moved(model: GptOss, recipe: Recipe, sources: SteeringSources | None = None) -> torch.Tensor:
    """Return what the interventions add to the stream after LAYER, at each token of the prompt."""
    ids = torch.tensor([recipe.prompt_ids(model)])
    point = f"blocks.{LAYER}.hook_resid_post"
    with torch.no_grad():
        _, before = model.run_with_cache(ids, names_filter=point)
        with applied(model, *recipe.edits(model, sources=sources)):
            _, after = model.run_with_cache(ids, names_filter=point)
    change: torch.Tensor = (after[point] - before[point])[0]
    return change


def test_vectors_and_features_are_added(nano: GptOss, vector: torch.Tensor, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vector.numpy())
    decoder = write_sae(tmp_path / "sae", nano.cfg.d_model)
    sources = read_sources([f"happy={tmp_path / 'v.npy'}"], [f"resid={tmp_path / 'sae'}"])
    scope = Scope(role=("user",))
    kinds = {
        "vector": (Intervention("vector", layers=(LAYER,), source="happy", strength=-2.0, scope=scope), -2.0 * vector),
        "feature": (Intervention("feature", source="resid", feature=1, strength=3.0, scope=scope), 3.0 * decoder[1]),
    }
    members = wb.harmony.token_set(tokenizer=nano.tokenizer, role="user")(Recipe(user="12+7").prompt_ids(nano))
    for one, want in kinds.values():
        got = moved(nano, Recipe(user="12+7", interventions=(one,)), sources)
        torch.testing.assert_close(got[members], want.expand(int(members.sum()), -1), rtol=1e-4, atol=1e-4)
        assert got[~members].abs().max() < 1e-4, "tokens outside the scope stay as they were"
        other = replace(one, strength=1.0)  # a negative control
        assert not torch.allclose(moved(nano, Recipe(user="12+7", interventions=(other,)), sources), got, atol=1e-2)
    for one, reason in (
        (replace(kinds["vector"][0], source="/etc/passwd"), "was not given .given: happy."),
        (replace(kinds["feature"][0], feature=3), "features 0 to 2"),
        (replace(kinds["vector"][0], layers=(9,)), "9"),
    ):
        with pytest.raises(InputError, match=reason):
            Recipe(interventions=(one,)).edits(nano, sources=sources)


def test_states_of_another_prompt_take_the_place_of_the_own(nano: GptOss) -> None:
    scope = Scope(role=("user",))
    patch = Intervention("patch", layers=(LAYER,), source="34+5", scope=scope)
    own, other = Recipe(user="12+7", interventions=(patch,)), Recipe(user="34+5")
    point = f"blocks.{LAYER}.hook_resid_post"
    members = wb.harmony.token_set(tokenizer=nano.tokenizer, role="user")(own.prompt_ids(nano))
    with torch.no_grad():
        _, there = nano.run_with_cache(torch.tensor([other.prompt_ids(nano)]))
        _, plain = nano.run_with_cache(torch.tensor([own.prompt_ids(nano)]))
        with applied(nano, *own.edits(nano)):
            _, here = nano.run_with_cache(torch.tensor([own.prompt_ids(nano)]))
    assert torch.equal(here[point][0, members], there[point][0, members])
    assert torch.equal(here[point][0, ~members], plain[point][0, ~members])
    assert not torch.allclose(here[point][0, members], plain[point][0, members]), (
        "nothing changed, or nothing is tested"
    )
    with pytest.raises(InputError, match="as many tokens"):
        Recipe(user="12+7", interventions=(replace(patch, source="345+56"),)).edits(nano)
    with pytest.raises(InputError, match="layers 0 to 3"):
        Recipe(user="12+7", interventions=(replace(patch, layers=(4,)),)).edits(nano)
    with pytest.raises(InputError, match="to its own prompt only"):
        wb.answers(nano, ["1+1"], own)


def test_a_direction_of_efforts_is_that_of_the_prompt_at_both(nano: GptOss) -> None:
    steer = Intervention("steer", layers=(LAYER,), toward="high", away="low", strength=2.0)
    recipe = Recipe(user="12+7", interventions=(steer,))
    means = []
    for effort in ("high", "low"):
        with torch.no_grad():
            _, cache = nano.run_with_cache(torch.tensor([Recipe(user="12+7", effort=effort).prompt_ids(nano)]))
        means.append(cache[f"blocks.{LAYER}.hook_resid_post"][0].double().mean(0))
    want = 2.0 * (means[0] - means[1]).float()
    got = moved(nano, recipe)
    torch.testing.assert_close(got, want.expand_as(got), rtol=1e-3, atol=1e-4)
    assert (got + want).abs().max() > 1e-2, "a negative control: the other sign"


def test_a_vector_is_read_from_three_formats(vector: torch.Tensor, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vector.numpy())
    save_file({"direction": vector}, tmp_path / "v.safetensors")
    torch.save(vector, tmp_path / "v.pt")
    for suffix in ("npy", "safetensors", "pt"):
        assert torch.equal(read_vector(tmp_path / f"v.{suffix}"), vector)


class Executed:
    """Would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_files_that_are_no_vector_are_refused(vector: torch.Tensor, tmp_path: Path) -> None:
    np.save(tmp_path / "matrix.npy", np.zeros((2, 3)))
    np.save(tmp_path / "nan.npy", np.array([1.0, np.nan]))
    np.save(tmp_path / "whole.npy", np.array([1, 2]))
    np.save(tmp_path / "objects.npy", np.array([Executed(tmp_path / "hit")], dtype=object), allow_pickle=True)
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Executed(tmp_path / "hit")))
    (tmp_path / "short.npy").write_bytes((tmp_path / "nan.npy").read_bytes()[:40])
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "v.txt").write_text("1 2 3")
    save_file({"a": vector, "b": vector + 1}, tmp_path / "two.safetensors")
    for name in ("matrix.npy", "nan.npy", "whole.npy", "objects.npy", "pickle.pt", "short.npy", "v.txt", "gone.npy"):
        with pytest.raises(InputError, match=name):
            read_vector(tmp_path / name)
    for name in ("text.safetensors", "two.safetensors"):
        with pytest.raises(InputError, match=name):
            read_vector(tmp_path / name)
    assert not (tmp_path / "hit").exists(), "what is in a file is not executed"
    for texts, reason in ((["a"], "NAME=PATH"), (["a/b=c.npy"], "NAME=PATH"), (["=c.npy"], "NAME=PATH")):
        with pytest.raises(InputError, match=reason):
            read_sources(texts)
    np.save(tmp_path / "v.npy", vector.numpy())
    with pytest.raises(InputError, match="given twice"):
        read_sources([f"a={tmp_path / 'v.npy'}"] * 2)


def test_an_sae_whose_decoder_is_no_direction_or_without_a_hook_is_refused(nano: GptOss, tmp_path: Path) -> None:
    write_sae(tmp_path / "a", nano.cfg.d_model, normalize_activations="layer_norm")
    write_sae(tmp_path / "b", nano.cfg.d_model, hook_name=None)
    sources = read_sources(saes=[f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}"])
    for name, reason in (("a", "normalizes"), ("b", "does not name its hook point")):
        with pytest.raises(InputError, match=reason):
            Recipe(interventions=(Intervention("feature", source=name),)).edits(nano, sources=sources)
    at_layer = Intervention("feature", source="b", layers=(LAYER,))
    assert Recipe(interventions=(at_layer,)).edits(nano, sources=sources)
    shutil.rmtree(tmp_path / "a")
