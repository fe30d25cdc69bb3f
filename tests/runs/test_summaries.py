"""Sums against a loop over tokens."""

import numpy as np
import pytest

from tests.runs.conftest import LENGTHS, MODEL, unit_data
from workbench.capture.plan import plan_units
from workbench.harmony.labels import CHANNELS
from workbench.runs.summaries import float32_of, summarise


@pytest.mark.parametrize("index", [0, 2])
def test_sums_equal_a_loop(index: int) -> None:
    layout = plan_units(LENGTHS, 1024)
    unit = layout.units[index]
    tokens, records = unit_data(layout, unit)
    got = summarise(records, tokens["sequence"], tokens["channel"], num_experts=MODEL["num_experts"])
    want = {name: np.zeros(values.shape) for name, values in got.items()}
    for t, (sequence, channel) in enumerate(zip(tokens["sequence"], tokens["channel"], strict=True)):
        row = unit.sequences.index(sequence)
        want["tokens"][row, channel] += 1
        for layer in range(MODEL["n_layers"]):
            chosen = records["experts"][layer, t]
            for e, g in zip(chosen, records["gates"][layer, t], strict=True):
                want["expert_count"][row, channel, layer, e] += 1
                want["gate_sum"][row, channel, layer, e] += float(g)
                want["coactivation"][channel, layer, e, chosen] += 1
                if layer + 1 < MODEL["n_layers"]:
                    want["transition"][channel, layer, e, records["experts"][layer + 1, t]] += 1
            sink = records["sink"][layer, t].astype(float)
            want["sink_sum"][row, channel, layer] += sink
            want["sink_sumsq"][row, channel, layer] += sink**2
        for i in range(2):
            want["hook_resid_post_sum"][row, channel, i] += float32_of(records["activations/hook_resid_post"][i, t])
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, rtol=1e-5, atol=1e-4, err_msg=name)
    assert got["tokens"].shape == (len(unit.sequences), len(CHANNELS))


def test_bfloat16_bits_are_the_upper_half_of_float32() -> None:
    values = np.array([1.0, -2.5, 0.0, 3.0e38], dtype=np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    np.testing.assert_allclose(float32_of(bits), values, rtol=2**-7)
