"""Hook points have unique names; short names as in TransformerLens lead to them; typos suggest the nearest name."""

import pytest

from workbench.errors import InputError
from workbench.hooks.names import BLOCK, closest_names, full_name, hook_points

KNOWN = hook_points(4)


def test_every_layer_has_every_hook_point_of_a_block() -> None:
    assert len(KNOWN) == 4 * len(BLOCK) + 4
    assert all(f"blocks.{layer}.{name}" in KNOWN for layer in range(4) for name in BLOCK)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (("resid_post", 1), "blocks.1.hook_resid_post"),
        ("resid_post1", "blocks.1.hook_resid_post"),
        (("sink", -1), "blocks.3.attn.hook_sink"),
        (("router", 0), "blocks.0.mlp.router.hook_out"),
        (("post", 2), "blocks.2.mlp.experts.hook_post"),
        (("scale", 0, "ln2"), "blocks.0.ln2.hook_scale"),
        (("embed",), "hook_embed"),
        ("blocks.2.attn.hook_z", "blocks.2.attn.hook_z"),
    ],
)
def test_short_names_are_those_of_transformer_lens(key: object, name: str) -> None:
    assert full_name(key, 4) == name
    assert name in KNOWN


@pytest.mark.parametrize("key", [("resid_post", 4), ("resid_post", -5), ("resid_post", "1"), 3, ()])
def test_keys_that_name_nothing_are_refused(key: object) -> None:
    with pytest.raises(InputError):
        full_name(key, 4)


def test_unknown_names_get_a_suggestion() -> None:
    assert "hook_resid_post" in closest_names("blocks.1.hook_resid_pots", KNOWN)
    assert "mlp.experts.hook_post" in closest_names("blocks.0.mlp.hook_post", KNOWN)
    for name, point in (("resid_post", "hook_resid_post"), ("blocks.*.hook_resid_post", "hook_resid_post")):
        assert f"lambda name: name.endswith('{point}')" in closest_names(name, KNOWN)
    for name in ("hook_pattern", "attn.hook_pattern", "*pattern"):
        assert "as blocks.0.attn.hook_pattern" in closest_names(name, KNOWN)
    for name in ("blocks.1.hook_resid_pots", "resid_pots", "*", "hook_embedding"):
        assert "every layer" not in closest_names(name, KNOWN), "a negative control"
