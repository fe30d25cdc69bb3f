"""Experiments: a model and a run together, to attribute what a model writes, or to change it and measure the effect.

Every experiment is one module with a record and `experiment(model, rows, *, seed)` (see `workbench.registry`);
`registry.run_experiment` runs it by name. The other modules are what experiments are made of: `attribution` and `lens`
read a pass, `gradients` estimates patches, `effects` measures interventions, `from_run` reads transcripts of a run.
"""

import importlib
from typing import TYPE_CHECKING, Any

from workbench.registry import experiments

if TYPE_CHECKING:
    from workbench.experiments import registry as registry

# modules that are not experiments themselves
_FUNCTIONS = {"graph": "attribution_graph"}  # public functions, and the module that has them
_MODULES = (
    "attribution",
    "circuits",
    "effects",
    "expert_logits",
    "expert_sets",
    "feature_ablation",
    "final_channel",
    "from_run",
    "gradients",
    "graph_ablation",
    "graph_checks",
    "graph_details",
    "graph_export",
    "hidden_messages",
    "intervals",
    "jacobians",
    "lens",
    "random_controls",
    "registry",
    "sampling",
)

__all__ = ["registry"]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"workbench.experiments.{_FUNCTIONS[name]}"), name)
    if name in _MODULES:  # late: torch is imported only when it is used
        return importlib.import_module(f"workbench.experiments.{name}")
    records = {record.attribute: record for record in experiments()}
    if name in records:
        return records[name].load()
    raise AttributeError(f"module 'workbench.experiments' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_FUNCTIONS, *(record.attribute for record in experiments())})
