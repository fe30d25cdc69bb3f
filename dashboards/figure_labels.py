"""Labels of a study's figures in the list that selects one, and their order: the most informative first."""

import re
from collections import Counter
from collections.abc import Iterable

from workbench.harmony.messages import EFFORTS

_ORDER = (
    "accuracy",
    "analysis_vs_final_matched",
    "difference_analysis_vs_final",
    "in_final_matched",
    "agreement_agreement",
    "sizes",
)
# what is drawn, by the beginning of a figure's name
_QUANTITIES = {
    "routing": "Routing",
    "sinks": "Sinks",
    "mass": "Sink attention",
    "load": "Expert load",
    "difference": "Difference in expert load",
    "divergence": "Divergence of routing",
    "position": "Sink attention by position",
}
# of single figures
_LABELS = {
    "experts_prompt_and_token": "Within prompts and tokens",
    "experts_prompt": "Within prompts",
    "experts_token": "Unpaired, at the same tokens",
    "experts_pooled": "Unpaired, all tokens pooled",
    "experts_matched": "Within prompts against unpaired",
    "heads_prompt_and_token": "Within prompts and tokens",
    "heads_prompt": "Within prompts",
    "overrepresented_tokens": "Over-represented tokens",
}
# how the difference is taken or drawn, by the end of the name
_ENDINGS = {"matched": "at equal position", "naive": "within prompts", "volcano": "volcano plot"}


def figure_names(names: Iterable[str]) -> dict[str, str]:
    """Return labels of figures → names, the most informative first.

    First agreement or accuracy, then the map of differences between analysis and final or else between efforts, then
    sizes.
    """
    every = list(names)
    # sizes of samples, and maps of all tokens
    last = [name for name in every if name.startswith(("mass_frame", "mass_prompt", "load_"))]
    last += [name for name in every if name.endswith(("naive", "_tokens", "_prompts", "_sequences"))]
    order = [name for name in every if name == "agreement"]
    order += [name for kind in _ORDER for name in every if name not in last and kind in name]
    order = list(dict.fromkeys((*order, *(n for n in every if n not in last), *last)))
    labels = [label(name) for name in order]
    counts = Counter(labels)
    return {text if counts[text] == 1 else f"{text} ({name})": name for text, name in zip(labels, order, strict=True)}


def label(name: str) -> str:
    """Return the label of a figure from its name, as "Routing: final, low vs. high effort, at equal position"."""
    if name in _LABELS:
        return _LABELS[name]
    words = name.split("_")
    ending = _ENDINGS.get(words[-1], "")
    words = words[:-1] if ending else words
    quantity = _QUANTITIES.get(words[0], "") if len(words) > 1 else ""
    topic = _topic(words[1:] if quantity else words)
    parts = [f"{quantity}: {topic}" if quantity else topic, *([ending] if ending else [])]
    text = ", ".join(parts)
    return text[:1].upper() + text[1:]


def _topic(words: list[str]) -> str:
    """Return what is compared or selected, without words that repeat the one before."""
    words = [word for before, word in zip(["", *words], words, strict=False) if word != before]
    text = " ".join(words)
    if match := re.fullmatch(r"(low|medium) vs (medium|high) in (.+)", text):
        return f"{match[3]}, {match[1]} vs. {match[2]} effort"
    if len(words) == 2 and words[1] in EFFORTS:
        return f"{words[0]}, {words[1]} effort"
    text = re.sub(r"^special in ", "specialization by ", text).removeprefix("in ")
    text = re.sub(r"^agreement (effort|position|margin)$", r"agreement by \1", text)
    text = text.replace("sizes", "size by layer").replace("halves of analysis", "first vs. second half of analysis")
    return re.sub(r"\bauc\b", "AUC", re.sub(r"\bvs\b(?!\.)", "vs.", text))
