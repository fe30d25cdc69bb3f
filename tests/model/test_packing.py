"""Passes hold consecutive sequences up to a number of tokens, and a packed pass computes what single passes do."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import workbench as wb
from workbench.harmony.transcripts import Transcript
from workbench.model.packing import pack, passes


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 60))
def test_passes_hold_every_sequence_once_in_order(lengths: list[int], most: int) -> None:
    batches = list(passes(lengths, most))
    assert [i for batch in batches for i in batch] == list(range(len(lengths)))
    for batch, following in zip(batches, [*batches[1:], None], strict=False):
        held = sum(lengths[i] for i in batch)
        assert held <= most or len(batch) == 1
        assert following is None or held + lengths[following[0]] > most  # no pass ends early


def row(ids: list[int]) -> Transcript:
    return Transcript("a", "a", "low", np.array(ids, dtype=np.int32), len(ids))


@torch.no_grad()
def test_a_packed_pass_equals_single_passes() -> None:
    model = wb.load("nano", dtype=torch.float32)
    rows = [row([5, 6, 7]), row([8, 9]), row([10, 11, 12, 13])]
    tokens, lengths = pack(rows, model.device)
    assert tokens.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13]]
    together = model.residual(tokens, packed=lengths)[0].split(lengths)
    for one, own in zip(rows, together, strict=True):
        torch.testing.assert_close(model.residual(pack([one]).tokens)[0], own, atol=1e-3, rtol=1e-3)
    broken = model.residual(tokens, packed=[sum(lengths)])[0].split(lengths)  # negative control: one long sequence
    with pytest.raises(AssertionError):
        torch.testing.assert_close(broken[1], together[1], atol=1e-3, rtol=1e-3)
