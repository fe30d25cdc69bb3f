"""Recipes survive their JSON, refuse what is not one, and compile to edits that do what the library's calls do.

Also tests `workbench.research.intervention` and `workbench.research.intervention_edits`.
"""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import workbench as wb
from workbench.errors import InputError
from workbench.harmony.transcripts import Transcript
from workbench.hooks.edits import Edit
from workbench.hooks.interventions import applied, forbid, force, knockout, reweight, scale_heads, scale_sinks
from workbench.model.transformer import GptOss
from workbench.research.recipe import Intervention, Recipe, Scope
from workbench.research.recipe_python import recipe_python

ANALYSIS = Scope(channel=("analysis",))
EVERYTHING = Recipe(
    user='12+7 <script>"</script>',
    developer="be brief",
    effort="high",
    begin="<|channel|>analysis<|message|>1",
    temperature=0.7,
    top_k=5,
    seed=3,
    max_new_tokens=9,
    samples=2,
    interventions=(
        Intervention("forbid", cells=((1, 5), (2, 0)), scope=Scope(role=("user", "assistant"))),
        Intervention("force", cells=((0, 3),), scope=Scope(start=4, stop=9)),
        Intervention("reweight", cells=((1, 2),), strength=0.25),
        Intervention("scale_sinks", layers=(0, 1), strength=2.0, scope=ANALYSIS),
        Intervention("scale_heads", layers=(1,), heads=(2,), strength=0.0, scope=ANALYSIS),
        Intervention("steer", layers=(2,), strength=-3.0, toward="analysis", away="final"),
        Intervention("steer", layers=(2,), toward="high", away="low"),
        Intervention("vector", layers=(1,), source="happy", strength=2.0),
        Intervention("feature", source="resid", feature=7),
        Intervention("patch", layers=(1,), source="3*4", source_effort="low"),
        Intervention("knockout", layers=(3,), heads=(1,), scope=Scope(channel=("final",)), keys=ANALYSIS),
    ),
    history=(("1+1", "2"), ("2+2", '4 "</script>')),
    expected="19",
)


@pytest.fixture(scope="module")
def nano() -> GptOss:
    model: GptOss = wb.load("nano", dtype=torch.float32)
    return model


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(user="3*4"), EVERYTHING])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_recipe_survives_its_json(recipe: Recipe, indent: int | None, tmp_path: Path) -> None:
    text = recipe.to_json(indent=indent)
    assert Recipe.from_json(text) == recipe
    (tmp_path / "r.json").write_text(text)
    assert Recipe.from_file(tmp_path / "r.json") == recipe
    for name in json.loads(text).keys() - {"recipe"}:  # a negative control: every field that is written counts
        less = {key: value for key, value in json.loads(text).items() if key != name}
        assert Recipe.from_json(json.dumps(less)) != recipe


REFUSED = {
    "no JSON": ("{", "not JSON"),
    "another document": ('{"user": "1"}', '"recipe": 1'),
    "a later version": ('{"recipe": 2}', '"recipe": 1'),
    "an unknown field": ('{"recipe": 1, "users": "1"}', "'users' is unknown"),
    "a text for a number": ('{"recipe": 1, "seed": "1"}', "seed is '1', expected int"),
    "true for a number": ('{"recipe": 1, "temperature": true}', "temperature is True"),
    "an unknown effort": ('{"recipe": 1, "effort": "max"}', "effort 'max'"),
    "too many samples": ('{"recipe": 1, "samples": 1000}', "samples from 1 to 256"),
    "NaN": ('{"recipe": 1, "temperature": NaN}', "temperature nan"),
    "no kind": ('{"recipe": 1, "interventions": [{}]}', "kind None"),
    "an unknown kind": ('{"recipe": 1, "interventions": [{"kind": "exec"}]}', "kind 'exec'"),
    "no cells": ('{"recipe": 1, "interventions": [{"kind": "forbid"}]}', "names no cells"),
    "no layers": ('{"recipe": 1, "interventions": [{"kind": "steer", "cells": [[0, 1]]}]}', "names no layers"),
    "half a cell": ('{"recipe": 1, "interventions": [{"kind": "forbid", "cells": [[0]]}]}', "pairs"),
    "a number for a cell": ('{"recipe": 1, "interventions": [{"kind": "forbid", "cells": [3]}]}', "pairs"),
    "a vector without a name": ('{"recipe": 1, "interventions": [{"kind": "vector", "layers": [0]}]}', "no source"),
    "a patch from nowhere": ('{"recipe": 1, "interventions": [{"kind": "patch", "layers": [0]}]}', "no other prompt"),
    "an effort and a channel": (
        '{"recipe": 1, "interventions": [{"kind": "steer", "layers": [0], "toward": "high"}]}',
        "two of low, medium, high",
    ),
    "heads of a router": (
        '{"recipe": 1, "interventions": [{"kind": "forbid", "cells": [[0, 1]], "heads": [1]}]}',
        "has no heads",
    ),
    "a negative feature": (
        '{"recipe": 1, "interventions": [{"kind": "feature", "source": "a", "feature": -1}]}',
        "counted from 0",
    ),
    "half a turn": ('{"recipe": 1, "history": [["1+1"]]}', "not a pair of texts"),
    "an infinite strength": (
        '{"recipe": 1, "interventions": [{"kind": "reweight", "cells": [[0, 1]], "strength": Infinity}]}',
        "strength",
    ),
    "an unknown channel": (
        '{"recipe": 1, "interventions": [{"kind": "forbid", "cells": [[0, 1]], "scope": {"channel": ["x"]}}]}',
        "'x'",
    ),
    "deep nesting": ('{"recipe": 1, "interventions": [[[[[[[[[[]]]]]]]]]]}', "nested deeper"),
    "too long": (json.dumps({"recipe": 1, "user": "x" * 200_001}), "at most 200,000 bytes"),
}


@pytest.mark.parametrize(("text", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_recipe_is_refused(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Recipe.from_json(text)


def logits(model: GptOss, ids: list[int], *edits: Edit) -> torch.Tensor:
    with torch.no_grad(), applied(model, *edits, need_match=False):
        out: torch.Tensor = model(torch.tensor([ids]))
    return out


def test_interventions_compile_to_the_library_s_edits(nano: GptOss) -> None:
    prompt = Recipe(user="12+7", effort="high").prompt_ids(nano)
    ids = [*prompt, *nano.generate([prompt], max_new_tokens=80)[0]]
    tokens = wb.harmony.token_set(tokenizer=nano.tokenizer, channel="analysis")
    early = wb.harmony.token_set(tokenizer=nano.tokenizer, position=slice(3, 9))
    pairs = {
        "forbid": (
            Intervention("forbid", cells=((1, 5), (2, 0), (1, 4)), scope=ANALYSIS),
            [forbid(1, [4, 5], tokens), forbid(2, [0], tokens)],
        ),
        "force": (Intervention("force", cells=((0, 3),), scope=Scope(start=3, stop=9)), [force(0, [3], early)]),
        "reweight": (
            Intervention("reweight", cells=tuple((1, e) for e in range(16)), strength=0.2),
            [reweight(1, range(16), 0.2)],
        ),
        "scale_sinks": (
            Intervention("scale_sinks", layers=(0, 1), strength=0.0, scope=ANALYSIS),
            [scale_sinks([0, 1], 0.0, tokens=tokens)],
        ),
        "heads": (
            Intervention("scale_sinks", layers=(0, 1), heads=(0, 2), strength=0.0),
            [scale_sinks([0, 1], 0.0, [0, 2])],
        ),
        "scale_heads": (
            Intervention("scale_heads", layers=(1, 2), heads=(0, 3), strength=0.0, scope=ANALYSIS),
            [scale_heads([1, 2], 0.0, [0, 3], tokens)],
        ),
        "knockout": (Intervention("knockout", layers=(1, 3), keys=ANALYSIS), [knockout([1, 3], None, tokens)]),
    }
    plain = logits(nano, ids)
    for name, (intervention, calls) in pairs.items():
        got = logits(nano, ids, *Recipe(interventions=(intervention,)).edits(nano))
        assert torch.equal(got, logits(nano, ids, *calls)), name
        assert not torch.equal(got, plain), f"{name}: nothing changed, or nothing is tested"
        moved = replace(intervention, scope=Scope(channel=("prompt",)))  # a negative control: another scope
        assert not torch.equal(got, logits(nano, ids, *Recipe(interventions=(moved,)).edits(nano))), name


def test_steering_adds_the_difference_of_channel_means(nano: GptOss) -> None:
    recipe = Recipe(user="12+7", effort="high", interventions=(Intervention("steer", layers=(2,), strength=1.5),))
    prompt = recipe.prompt_ids(nano)
    ids = [*prompt, *nano.generate([prompt], max_new_tokens=90)[0]]
    row = Transcript("a", "a", "high", torch.tensor(ids).int().numpy(), len(prompt))
    with torch.no_grad():
        _, cache = nano.run_with_cache(torch.tensor([ids]))
    stream = cache["blocks.2.hook_resid_post"][0].double()
    masks = [
        torch.from_numpy(wb.harmony.token_set(tokenizer=nano.tokenizer, channel=c)(ids)) for c in ("final", "analysis")
    ]
    want = stream[masks[0]].mean(0) - stream[masks[1]].mean(0)
    with torch.no_grad(), applied(nano, *recipe.edits(nano, [row])):
        _, after = nano.run_with_cache(torch.tensor([ids]))
    moved = (after["blocks.2.hook_resid_post"][0].double() - stream)[5]
    torch.testing.assert_close(moved, 1.5 * want, rtol=1e-3, atol=1e-4)
    assert (moved - want).abs().max() > 1e-3, "a negative control: another strength"
    with pytest.raises(InputError, match="needs transcripts"):
        recipe.edits(nano)


def test_what_the_model_lacks_is_refused(nano: GptOss) -> None:
    for one, reason in (
        (Intervention("forbid", cells=((9, 0),)), "layers 0 to 3"),
        (Intervention("force", cells=((0, 99),)), "experts 0 to 15"),
        (Intervention("scale_sinks", layers=(4,)), "layers 0 to 3"),
    ):
        with pytest.raises(InputError, match=reason):
            Recipe(interventions=(one,)).edits(nano)


def test_texts_stay_texts_in_the_python_of_a_recipe() -> None:
    hostile = "\"]) \n import os\nos.abort() ''' \\"
    recipe = replace(EVERYTHING, user=hostile, developer=hostile, begin=hostile, model=hostile)
    tree = ast.parse(recipe_python(recipe))
    assert [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)].count(hostile) == 4
    imported = [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
    assert set(imported) == {"workbench", "numpy", "torch"}
    careless = f'user = "{hostile}"'  # a negative control
    with pytest.raises(SyntaxError):
        ast.parse(careless)


def test_answers_take_a_recipe(nano: GptOss) -> None:
    recipe = Recipe(interventions=(Intervention("forbid", cells=tuple((1, e) for e in range(10))),))
    options = {"effort": "low", "max_new_tokens": 8}
    assert wb.answers(nano, ["12+7"], recipe, **options).table.equals(  # type: ignore[arg-type]
        wb.answers(nano, ["12+7"], recipe.edits(nano), **options).table  # type: ignore[arg-type]
    )


def test_a_recipe_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nope\.json cannot be read: No such file or directory; give the path"):
        Recipe.from_file(tmp_path / "nope.json")
