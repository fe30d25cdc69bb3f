"""Every tensor has one name in each layout, and the shape that the model's own parameter has."""

import pytest

from tests.model.conftest import BASE
from workbench.model.names import LAYOUTS, name_in, shapes
from workbench.model.transformer import GptOss


@pytest.mark.parametrize("experts", ["dense", "mxfp4"])
def test_names_and_shapes_are_those_of_the_model(experts: str) -> None:
    state = GptOss(BASE, packed=experts == "mxfp4").state_dict()
    assert shapes(BASE, experts) == {name: tuple(value.shape) for name, value in state.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_of_a_layout_are_distinct_but_for_the_joined_matrix(layout: str) -> None:
    canonical = list(shapes(BASE, "mxfp4"))
    names = [name_in(layout, name) for name in canonical]
    joined = 4 * BASE.n_layers if layout == "original" else 0  # q, k and v are one matrix with one bias
    assert len(set(names)) == len(canonical) - joined


def test_published_names() -> None:
    assert name_in("huggingface", "blocks.2.attn.sinks") == "model.layers.2.self_attn.sinks"
    assert name_in("original", "blocks.2.mlp.experts.down.blocks") == "block.2.mlp.mlp2_weight.blocks"
    with pytest.raises(KeyError):
        name_in("huggingface", "blocks.2.attn.other")
