"""What compiled loops are given of a layer and of a step: phases, sizes, addresses of weights and of values.

`LAYER` states where the weights of a layer are and how large it is; `STEP` where the values of a step are. All are
addresses and sizes in elements, except the bytes between keys.
"""

from enum import IntEnum

import numpy as np


class Phase(IntEnum):
    """The phases of a layer in their order; `END` follows the last."""

    ATTENTION_NORM = 0
    PROJECT = 1
    ATTEND = 2
    OUTPUT = 3
    EXPERT_NORM = 4
    ROUTE = 5
    CHOOSE = 6
    GATE = 7
    GROUP = 8
    GATE_UP = 9
    ACTIVATE = 10
    DOWN = 11
    COMBINE = 12
    END = 13


_SIZES = ("d_model", "n_heads", "n_key_value_heads", "d_head", "window", "num_experts", "k", "d_mlp")
WEIGHTS = (
    "ln1", "q", "q_bias", "k_weight", "k_bias", "v", "v_bias", "sinks", "o", "o_bias", "ln2", "router", "router_bias",
    "gate_up_blocks", "gate_up_scales", "gate_up_bias", "down_blocks", "down_scales", "down_bias",
)  # fmt: skip
_NUMBERS = ("eps", "limit", "alpha")
LAYER = np.dtype(
    [(name, np.int64) for name in (*_SIZES, *WEIGHTS, "scales")] + [(name, np.float32) for name in _NUMBERS]
)
# The values of a step, in the order of `values` in `layer`; and what it is given besides.
VALUES = (
    "scale", "normalized", "queries", "new_keys", "new_values", "scores", "weighted", "lse", "sink", "z",
    "attention_out", "middle", "expert_input", "expert_groups", "logits", "choice", "gates", "order", "hit", "ends",
    "hits", "pairs", "post", "slot_out", "mlp_out", "result",
)  # fmt: skip
GIVEN = ("rows", "x", "keys", "values", "row_bytes", "key_bytes", "columns", "cos", "sin", "rotates")
STEP = np.dtype([(name, np.int64) for name in (*VALUES, *GIVEN)])

COUNTER_BYTES = 128  # of a phase: two counters, in lines of memory of their own
BLOCK = 128  # keys whose scores of all heads are held at a time
