"""Export a recipe as a Python program that generates the same answers with the library alone."""

from workbench.harmony.messages import EFFORTS
from workbench.research.intervention import CELL_KINDS, STEERING_KINDS, Intervention, Scope
from workbench.research.recipe import Recipe

_EFFORT_MEANS = """
def transcript(effort):
    ids = wb.harmony.render(messages, effort=effort, tokenizer=model.tokenizer)
    return Transcript(effort, "prompt", effort, np.array(ids, dtype=np.int32), len(ids))

"""
_STATES = """
@torch.no_grad()
def states(layers, user, effort):
    other = [*messages[:-1], {"role": "user", "content": user}]
    ids = wb.harmony.render(other, effort=effort, tokenizer=model.tokenizer)
    assert len(ids) == len(wb.harmony.render(messages, effort=OWN_EFFORT, tokenizer=model.tokenizer))
    points = [f"blocks.{layer}.hook_resid_post" for layer in layers]
    _, cache = model.run_with_cache(torch.tensor([ids], device=model.device), names_filter=points)
    return {point: cache[point] for point in points}

"""


def recipe_python(recipe: Recipe) -> str:
    """Return the program. Every text is written as a Python literal.

    Saved vectors and autoencoders are read from NAME.npy and from the folder NAME: put the right paths there.
    """
    lines = [
        *_imports(recipe),
        "",
        f"model = wb.load({recipe.model!r})",
        "messages = [",
        *(f'    {{"role": "{message["role"]}", "content": {message["content"]!r}}},' for message in recipe.messages()),
        "]",
        f"prompt = wb.harmony.render(messages, effort={recipe.effort!r}, tokenizer=model.tokenizer)",
        *([f"prompt += marked_ids({recipe.begin!r}, model.tokenizer)"] if recipe.begin else []),
        f"options = {recipe.options!r}",
        "original = model.generate([prompt], **options)",
    ]
    if recipe.needs_directions:
        lines += [
            "tokens = np.array(prompt + original[0], dtype=np.int32)",
            f'answer = Transcript(id="original", prompt_id="original", effort={recipe.effort!r}, tokens=tokens, '
            "n_prompt=len(prompt), answer=None, correct=None, meta={})",
        ]
    if _steers_by_effort(recipe):
        lines += _EFFORT_MEANS.splitlines()
    if _kinds(recipe, "patch"):
        lines += _STATES.replace("OWN_EFFORT", repr(recipe.effort)).splitlines()
    if recipe.interventions:
        lines += ["edits = [", *(f"    {line}," for one in recipe.interventions for line in _calls(one, recipe)), "]"]
        lines += [
            "with applied(model, *edits, need_match=False) as report:",
            "    edited = model.generate([prompt], **options)",
        ]
        lines += ["print(*report, sep='\\n')"]
    answers = "[original, edited]" if recipe.interventions else "[original]"
    lines += [f"for answers in {answers}:", "    for ids in answers:", "        print(model.tokenizer.decode(ids))"]
    return "\n".join(lines) + "\n"


def _imports(recipe: Recipe) -> list[str]:
    """Return the lines that import what the program uses."""
    by_effort = _steers_by_effort(recipe)
    needed = {
        "import numpy as np": recipe.needs_directions or by_effort,
        "import torch": _kinds(recipe, "patch"),
        "import workbench as wb": True,
        "from workbench.harmony.grammar import marked_ids": bool(recipe.begin),
        "from workbench.harmony.transcripts import Transcript": recipe.needs_directions or by_effort,
        f"from workbench.hooks.interventions import {', '.join(sorted({'applied', *_functions(recipe)}))}": True,
        "from workbench.hooks.sae import load_sae": _kinds(recipe, "feature"),
        "from workbench.research.steering_sources import read_vector": _kinds(recipe, "vector"),
    }
    return [line for line, wanted in needed.items() if wanted]


def _kinds(recipe: Recipe, kind: str) -> bool:
    return any(one.kind == kind for one in recipe.interventions)


def _steers_by_effort(recipe: Recipe) -> bool:
    return any(one.kind == "steer" and one.toward in EFFORTS for one in recipe.interventions)


def _functions(recipe: Recipe) -> set[str]:
    return {"steer" if one.kind in STEERING_KINDS else one.kind for one in recipe.interventions}


def _calls(one: Intervention, recipe: Recipe) -> list[str]:
    """Return the calls that make the edits of an intervention."""
    tokens = _token_set(one.scope)
    if one.kind in CELL_KINDS:
        layers = sorted({layer for layer, _ in one.cells})
        strength = f", {one.strength!r}" if one.kind == "reweight" else ""
        by_layer = {n: [expert for layer, expert in one.cells if layer == n] for n in layers}
        return [f"{one.kind}({n}, {experts}{strength}, tokens={tokens})" for n, experts in by_layer.items()]
    heads = list(one.heads) if one.heads else None
    if one.kind in ("scale_sinks", "scale_heads"):
        return [f"{one.kind}({list(one.layers)}, {one.strength!r}, {heads}, tokens={tokens})"]
    if one.kind == "knockout":
        return [f"knockout({list(one.layers)}, {tokens}, {_token_set(one.keys)}, {heads})"]
    if one.kind == "patch":
        user = repr(one.source) if one.source else 'messages[-1]["content"]'
        points = [f"blocks.{n}.hook_resid_post" for n in one.layers]
        effort = one.source_effort or recipe.effort
        return [f"patch({points}, states({list(one.layers)}, {user}, {effort!r}), tokens={tokens})"]
    return _steering_calls(one, tokens)


def _steering_calls(one: Intervention, tokens: str) -> list[str]:
    """Return the calls of an intervention that adds a direction."""
    if one.kind == "feature":
        sae = f"load_sae({one.source!r})"
        points = repr([f"blocks.{n}.hook_resid_post" for n in one.layers]) if one.layers else f"{sae}.cfg.hook_name"
        return [f"steer({points}, {sae}.W_dec[{one.feature}].detach().float(), {one.strength!r}, tokens={tokens})"]
    if one.kind == "vector":
        points = repr([f"blocks.{n}.hook_resid_post" for n in one.layers])
        return [f"steer({points}, read_vector({one.source + '.npy'!r}), {one.strength!r}, tokens={tokens})"]
    of_efforts = one.toward in EFFORTS
    label = "effort" if of_efforts else "channel"
    rows = f"[transcript({one.toward!r}), transcript({one.away!r})]" if of_efforts else "[answer]"
    pair = f'a={{"{label}": {one.toward!r}}}, b={{"{label}": {one.away!r}}}'
    return [
        f'steer("blocks.{n}.hook_resid_post", '
        f'wb.direction(model, "resid_post", {n}, {pair}, transcripts={rows}), {one.strength!r}, tokens={tokens})'
        for n in one.layers
    ]


def _token_set(scope: Scope) -> str:
    """Return the expression of a token set."""
    if scope == Scope():
        return "None"
    options = [f"{name}={list(value)!r}" for name, value in (("channel", scope.channel), ("role", scope.role)) if value]
    if scope.start or scope.stop is not None:
        options.append(f"position=slice({scope.start}, {scope.stop})")
    return f"wb.harmony.token_set(tokenizer=model.tokenizer, {', '.join(options)})"
