"""Which compiled kernels spill registers, as reported by the driver of the GPU that runs them.

The ahead-of-time report reads spills from machine code of one version of Triton. Another version, or the driver's own
assembler, can allocate registers differently: `workbench bench gpu --first` therefore asks the loaded kernels.
"""

import importlib
import pkgutil

from triton.runtime.jit import JITFunction

from workbench.kernels import gpu


def spilled() -> dict[str, int]:
    """Return kernel → registers that spill to local memory, a thread, of the variant that spills most.

    Only kernels that this process has launched on a GPU are counted, and only those that spill are in the result.
    """
    most: dict[str, int] = {}
    for info in pkgutil.iter_modules(gpu.__path__):
        module = importlib.import_module(f"{gpu.__name__}.{info.name}")
        for function in vars(module).values():
            if isinstance(function, JITFunction):
                for variants, *_ in function.device_caches.values():
                    for kernel in variants.values():
                        if registers := int(kernel.n_spills or 0):
                            most[function.__name__] = max(most.get(function.__name__, 0), registers)
    return most
