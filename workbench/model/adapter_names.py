"""What a module name in an adapter's file adapts: a matrix, and of the experts' matrices which expert and which rows.

Programs name the experts in four ways: PEFT adapts the stacked parameters of `mlp.experts`; Unsloth's 4-bit models have
a linear map for each expert, `experts.gate_up_projs.N`; others `experts.N.gate_proj` or `experts.N.w1`; and some stack
the factors of all experts along a first axis, `experts.w1`. w1 is the gate, w3 the up, w2 the down projection.

PEFT puts `base_model.model.` before the names of a model's modules; other programs leave it out or add their own, and
an adapter of the backbone alone lacks `model.`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from workbench.model.config import Config
from workbench.model.names import name_in, shapes
from workbench.model.stored_names import unwrapped

_PARTS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.router", "mlp.experts.gate_up", "mlp.experts.down")
_ALL, _GATE, _UP = (0, 1), (0, 2), (1, 2)  # first row and step: gate and up alternate in the published matrix
_EXPERT_MATRICES = {
    "gate_up_projs": ("gate_up", _ALL),
    "gate_up_proj": ("gate_up", _ALL),
    "gate_proj": ("gate_up", _GATE),
    "w1": ("gate_up", _GATE),
    "up_proj": ("gate_up", _UP),
    "w3": ("gate_up", _UP),
    "down_projs": ("down", _ALL),
    "down_proj": ("down", _ALL),
    "w2": ("down", _ALL),
}
_NAMES = "|".join(_EXPERT_MATRICES)
_EXPERT = re.compile(rf"(?P<module>.+\.experts)\.(?:(?P<n>\d+)\.)?(?P<name>{_NAMES})(?:\.(?P<last>\d+))?")
_BEGINNING = re.compile(r"((base_model|model|module|_orig_mod|language_model|pretrained_model)\.)*")
_OUTSIDE = ("lm_head", "unembed_tokens")  # the modules that are not in the backbone
_OTHER_NAMES = {"mlp.router.linear": "mlp.router", "unembed_tokens": "lm_head"}


@dataclass(frozen=True)
class Target:
    """A matrix that can be adapted: its name here, the key that PEFT's patterns match, and its sizes.

    experts: the number of matrices in a stack, 1 for a linear map. expert: the one of them that is adapted, None for
    all. step: the first of the outputs that are adapted, and the distance to the next.
    """

    part: str
    key: str
    experts: int
    inputs: int
    outputs: int
    expert: int | None = None
    step: tuple[int, int] = _ALL

    @property
    def columns(self) -> slice:
        """Return the outputs that are adapted."""
        return slice(self.step[0], self.outputs, self.step[1])

    @property
    def adapted_outputs(self) -> int:
        """Return the number of outputs that are adapted."""
        return len(range(self.outputs)[self.columns])


def module_name(stored: str) -> str:
    """Return a stored name of a module or tensor as the model has it, without what programs add to it."""
    rest = _BEGINNING.sub("", unwrapped(stored), count=1)
    return rest if rest.startswith(_OUTSIDE) else f"model.{rest}"


def targets(cfg: Config) -> dict[str, list[Target]]:
    """Return PEFT's module name → what can be adapted in it: two matrices in the experts, else one."""
    by_module: dict[str, list[Target]] = {}
    wanted = shapes(cfg, "dense")
    for layer in range(cfg.n_layers):
        for part in (f"blocks.{layer}.{name}" for name in _PARTS):
            parameter, shape = name_in("huggingface", f"{part}.weight"), wanted[f"{part}.weight"]
            module = parameter.rpartition(".")[0]
            key = module if ".attn." in part else parameter  # the router is not a linear module in transformers
            experts, inputs, outputs = shape if len(shape) == 3 else (1, shape[1], shape[0])
            by_module.setdefault(module, []).append(Target(part, key, experts, inputs, outputs))
    by_module["lm_head"] = [Target("unembed", "lm_head", 1, cfg.d_model, cfg.d_vocab)]
    return by_module


def targets_of(module: str, known: Mapping[str, list[Target]]) -> list[Target]:
    """Return the matrices that a module name can stand for; an empty list if there are none."""
    name = re.sub(r"(\.base_layer)+$", "", module)
    for other, standard in _OTHER_NAMES.items():
        name = re.sub(rf"(^|\.){re.escape(other)}$", rf"\g<1>{standard}", name)
    if name in known:
        return known[name]
    match = _EXPERT.fullmatch(name)
    if match is None or match["module"] not in known or (match["n"] and match["last"]):
        return []
    part, step = _EXPERT_MATRICES[match["name"]]
    number = match["n"] or match["last"]
    return [
        Target(t.part, name, t.experts, t.inputs, t.outputs, None if number is None else int(number), step)
        for t in known[match["module"]]
        if t.part.endswith(part) and (number is None or int(number) < t.experts)
    ]
