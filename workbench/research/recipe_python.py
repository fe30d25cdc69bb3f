"""A recipe as a Python program that makes the same answers with the library alone."""

from workbench.research.recipe import CELL_KINDS, Intervention, Recipe, Scope


def recipe_python(recipe: Recipe) -> str:
    """Return the program. Every text is written as a Python literal."""
    lines = [
        "import workbench as wb",
        "from workbench.harmony.grammar import marked_ids",
        *(
            ["from workbench.harmony.transcripts import Transcript", "import numpy as np"]
            if recipe.needs_directions
            else []
        ),
        f"from workbench.hooks.interventions import {', '.join(sorted({'applied', *_functions(recipe)}))}",
        "",
        f"model = wb.load({recipe.model!r})",
        "messages = [",
        *([f'    {{"role": "developer", "content": {recipe.developer!r}}},'] if recipe.developer else []),
        f'    {{"role": "user", "content": {recipe.user!r}}},',
        "]",
        f"prompt = wb.harmony.render(messages, effort={recipe.effort!r}, tokenizer=model.tokenizer)",
        *([f"prompt += marked_ids({recipe.begin!r}, model.tokenizer)"] if recipe.begin else []),
        f"options = {recipe.options!r}",
        "original = model.generate([prompt], **options)",
    ]
    if not recipe.begin:
        lines.remove("from workbench.harmony.grammar import marked_ids")
    if recipe.needs_directions:
        effort = recipe.effort
        lines += [
            "tokens = np.array(prompt + original[0], dtype=np.int32)",
            f'answer = Transcript(id="original", prompt_id="original", effort={effort!r}, tokens=tokens, '
            "n_prompt=len(prompt), answer=None, correct=None, meta={})",
        ]
    if recipe.interventions:
        lines += ["edits = [", *(f"    {line}," for one in recipe.interventions for line in _calls(one)), "]"]
        lines += ["with applied(model, *edits) as report:", "    edited = model.generate([prompt], **options)"]
        lines += ["print(*report, sep='\\n')"]
    answers = "[original, edited]" if recipe.interventions else "[original]"
    lines += [f"for answers in {answers}:", "    for ids in answers:", "        print(model.tokenizer.decode(ids))"]
    return "\n".join(lines) + "\n"


def _functions(recipe: Recipe) -> set[str]:
    return {one.kind for one in recipe.interventions}


def _calls(one: Intervention) -> list[str]:
    """Return the calls that make the edits of an intervention."""
    tokens = _token_set(one.scope)
    if one.kind in CELL_KINDS:
        layers = sorted({layer for layer, _ in one.cells})
        strength = f", {one.strength!r}" if one.kind == "reweight" else ""
        by_layer = {n: [expert for layer, expert in one.cells if layer == n] for n in layers}
        return [f"{one.kind}({n}, {experts}{strength}, tokens={tokens})" for n, experts in by_layer.items()]
    if one.kind == "scale_sinks":
        return [f"scale_sinks({list(one.layers)}, {one.strength!r}, tokens={tokens})"]
    if one.kind == "knockout":
        return [f"knockout({list(one.layers)}, {tokens}, {_token_set(one.keys)})"]
    pair = f'a={{"channel": {one.toward!r}}}, b={{"channel": {one.away!r}}}'
    return [
        f'steer("blocks.{n}.hook_resid_post", '
        f'wb.direction(model, "resid_post", {n}, {pair}, transcripts=[answer]), {one.strength!r}, tokens={tokens})'
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
