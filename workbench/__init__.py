"""The gpt-oss workbench: look inside OpenAI's open-weight reasoning models.

Importing this package costs milliseconds: every public name is resolved on first use (PEP 562), so that reading a run
never pays for torch. `dir(workbench)` lists the public names.
"""

import importlib
import importlib.util
import types
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import _deferred_packages
from workbench._links import require_links

if TYPE_CHECKING:
    from workbench import experiments as experiments
    from workbench import figures as figures
    from workbench import harmony as harmony
    from workbench import studies as studies
    from workbench.adapters.finetune import finetune as finetune
    from workbench.capture.job import capture as capture
    from workbench.capture.recorder import Recorder as Recorder
    from workbench.errors import InputError as InputError
    from workbench.model import load as load
    from workbench.research.answers import accuracy as accuracy
    from workbench.research.answers import answers as answers
    from workbench.research.directions import direction as direction
    from workbench.research.probes import probe as probe
    from workbench.research.top_experts import top_experts as top_experts
    from workbench.runs import Run as Run
    from workbench.runs import open_run as open_run

    __version__: str

require_links(Path(__file__).parent)
_deferred_packages.defer()
# transformer_lens imports tqdm, which warns in every notebook without ipywidgets; our own bars need none
warnings.filterwarnings("ignore", message="IProgress not found")

_OBJECTS = {
    "load": "workbench.model",
    "open_run": "workbench.runs",
    "Run": "workbench.runs",
    "InputError": "workbench.errors",
    "Recorder": "workbench.capture.recorder",
    "accuracy": "workbench.research.answers",
    "finetune": "workbench.adapters.finetune",
    "answers": "workbench.research.answers",
    "direction": "workbench.research.directions",
    "probe": "workbench.research.probes",
    "top_experts": "workbench.research.top_experts",
}
_PACKAGES = ("capture", "experiments", "figures", "harmony", "studies")  # `capture` is a package that can be called
_LINKED = ("dashboards", "hooks", "kernels")  # folders without an `__init__.py`

__all__ = [
    "InputError",
    "Recorder",
    "Run",
    "__version__",
    "accuracy",
    "answers",
    "capture",
    "dashboards",
    "direction",
    "experiments",
    "figures",
    "finetune",
    "harmony",
    "hooks",
    "kernels",
    "load",
    "open_run",
    "probe",
    "studies",
    "top_experts",
]

_HAS = f"it has {', '.join(__all__)}"
_MODEL = "use wb.load('nano'), wb.load(FOLDER) or wb.load('openai/gpt-oss-20b'), a TransformerLens HookedRootModule"
# what users of other libraries look for
_INSTEAD = dict.fromkeys(
    ("HookedTransformer", "TransformerBridge", "AutoModelForCausalLM", "GptOss", "from_pretrained", "load_model"),
    _MODEL,
) | {
    "patching": "use transformer_lens.patching with a model of wb.load, or wb.experiments.patching",
    "utils": "use transformer_lens.utilities, or workbench.hooks.names.full_name(('resid_post', 3), n_layers)",
    "test_prompt": "use transformer_lens.utilities.test_prompt(prompt, answer, model)",
    "get_act_name": "use workbench.hooks.names.full_name(('resid_post', 3), n_layers)",
    "generate": "use model.generate(prompts)",
    "render": "use wb.harmony.render(messages, effort=…, tokenizer=model.tokenizer)",
    "tokenizer": "use wb.harmony.tokenizer() or model.tokenizer",
    "open_zarr": "use wb.open_run(path)",
    "open_dataset": "use wb.open_run(path).dataset",
    "interventions": "use wb.hooks.interventions",
    "forbid": "use wb.hooks.interventions.forbid",
    "steer": "use wb.hooks.interventions.steer",
}


class _LinkedPackage(types.ModuleType):
    """A package without an `__init__.py`, whose modules are imported when they are accessed."""

    def __getattr__(self, name: str) -> Any:
        dotted = f"{self.__name__}.{name}"
        if name.startswith("_") or importlib.util.find_spec(dotted) is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return importlib.import_module(dotted)

    def __dir__(self) -> list[str]:
        modules = {path.stem for folder in self.__path__ for path in Path(folder).glob("*.py")}
        return sorted(modules | {path.name for folder in self.__path__ for path in Path(folder).glob("gpu")})


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("workbench.version").version()
    if name in _OBJECTS:
        return getattr(importlib.import_module(_OBJECTS[name]), name)
    if name in _LINKED:
        package = importlib.import_module(f"workbench.{name}")
        package.__class__ = _LinkedPackage
        return package
    if name in (*_PACKAGES, "runs", "model"):
        return importlib.import_module(f"workbench.{name}")
    raise AttributeError(f"module 'workbench' has no attribute {name!r}; {_INSTEAD.get(name, _HAS)}")


def __dir__() -> list[str]:
    return sorted(__all__)
