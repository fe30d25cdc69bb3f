"""Every pass has the sequence and position of its tokens, and recorders and token sets build on it."""

import numpy as np
import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.model.conftest import BASE, random_model
from workbench.hooks.edits import as_set
from workbench.hooks.recorders import SequenceRecorder
from workbench.model.cache import KVCache
from workbench.model.pass_context import PassContext
from workbench.model.transformer import GptOss

WANTED = {
    "blocks.1.mlp.hook_expert_indices": torch.uint8,
    "blocks.2.attn.hook_sink": torch.float32,
    "ln_final.hook_normalized": torch.float32,
}


def odd(ids: np.ndarray) -> np.ndarray:
    return ids % 2 == 1


def test_packed_tokens_count_from_their_own_beginning() -> None:
    where = PassContext(BASE, torch.tensor([[1, 2, 3, 4, 5]]), packed=[2, 0, 3])
    assert where.sequence.tolist() == [[0, 0, 2, 2, 2]]
    assert where.positions.tolist() == [[0, 1, 0, 1, 2]]
    assert where.mask(odd).tolist() == [[True, False, True, False, True]]
    first = where.mask(lambda ids: np.arange(len(ids)) == 0)
    assert first.tolist() == [[True, False, True, False, False]]


def test_padding_belongs_to_nobody() -> None:
    where = PassContext(BASE, torch.tensor([[1, 3, 9], [5, 9, 9]]), n_real=[2, 1])
    assert where.sequence.tolist() == [[0, 0, -1], [1, -1, -1]]
    assert where.mask(odd).tolist() == [[True, True, False], [True, False, False]]
    assert where.at(torch.tensor([[1], [0]])).mask(lambda ids: ids == 3).tolist() == [[True], [False]]


def test_steps_know_what_came_before_them() -> None:
    cache = KVCache(BASE, 3, 9, dtype=torch.float32, device=torch.device("cpu"))
    PassContext(BASE, torch.tensor([[1, 2, 3], [4, 5, 0], [6, 7, 8]]), cache, n_real=[3, 2, 3])
    cache.advance(3)
    cache.truncate(torch.tensor([3, 2, 3]))
    cache.select(torch.tensor([1, 2]))
    where = PassContext(BASE, torch.tensor([[11], [12]]), cache)
    seen = []
    mask = where.mask(lambda ids: seen.append(ids.tolist()) or ids > 11)
    assert seen == [[4, 5, 11], [6, 7, 8, 12]]
    assert mask.tolist() == [[False], [True]]
    assert where.sequence.tolist() == [[1], [2]]
    assert where.key_mask(odd).tolist() == [[False, True, True, False], [False, True, False, False]]


def test_every_token_is_selected_without_a_look_at_those_before() -> None:
    def everything(ids: np.ndarray) -> np.ndarray:
        return np.ones(len(ids), dtype=bool)

    cache = KVCache(BASE, 2, 9, dtype=torch.float32, device=torch.device("cpu"))
    tokens = torch.tensor([[1, 3, 9], [5, 9, 9]])
    padded = PassContext(BASE, tokens, cache, n_real=[2, 1])
    packed = PassContext(BASE, tokens[:1], packed=[2, 0, 1])
    for where in (padded, packed, padded.at(torch.tensor([[1], [1]]))):
        assert where.mask(as_set(None)).tolist() == where.mask(everything).tolist()
    assert padded.mask(as_set(None)).tolist() == [[True, True, False], [True, False, False]], "padding is not selected"
    cache.advance(3)
    step = PassContext(BASE, torch.tensor([[11], [12]]), cache)
    step._streams = None  # type: ignore[assignment,method-assign]  # asking for the sequences fails
    assert step.mask(as_set(None)).tolist() == [[True], [True]]
    with pytest.raises(TypeError):
        step.mask(everything)  # a negative control: another set of tokens has to read them


def replayed(model: GptOss, ids: list[int]) -> dict[str, Tensor]:
    _, cache = model.run_with_cache(torch.tensor([ids]), names_filter=list(WANTED))
    return {name: cache[name][0] for name in WANTED}


@torch.no_grad()
def test_what_a_generation_records_its_replay_gives_again() -> None:
    """Batched, with prompts of unequal length and rows that stop at different steps, on a trained model."""
    model = wb.load("nano", dtype=torch.float32)
    prompts = [
        wb.harmony.render([{"role": "user", "content": text}], effort=effort, tokenizer=model.tokenizer)
        for text, effort in (("3*4*2", "high"), ("12+7", "low"), ("sort: d b a c", "medium"), ("17+5-2", "high"))
    ]
    recorder = SequenceRecorder(model, WANTED)
    with model.hooks(fwd_hooks=recorder.fwd_hooks):
        new = model.generate(prompts, max_new_tokens=60)
    taken = recorder.take()
    assert len({len(n) for n in new}) > 1, "all rows stopped together: the test would miss a wrong row"
    for prompt, answer, recorded in zip(prompts, new, taken, strict=True):
        want = replayed(model, [*prompt, *answer[:-1]])
        routed = recorded["blocks.1.mlp.hook_expert_indices"]
        assert torch.equal(routed, want["blocks.1.mlp.hook_expert_indices"].to(torch.uint8))
        torch.testing.assert_close(
            recorded["blocks.2.attn.hook_sink"], want["blocks.2.attn.hook_sink"], rtol=1e-3, atol=1e-4
        )
        last = want["ln_final.hook_normalized"][len(prompt) - 1 :]  # logits of a prompt are made of its end only
        torch.testing.assert_close(recorded["ln_final.hook_normalized"], last, rtol=1e-3, atol=1e-3)
    assert not torch.equal(
        taken[0]["blocks.1.mlp.hook_expert_indices"][:20], taken[1]["blocks.1.mlp.hook_expert_indices"][:20]
    ), "two rows say the same: the comparison could not see them swapped"


@torch.no_grad()
def test_packed_and_padded_sequences_are_recorded_apart() -> None:
    model = random_model(BASE)
    lengths = [7, 1, 20]
    rows = torch.randint(BASE.d_vocab, (1, 28), generator=torch.Generator().manual_seed(2)).split(lengths, 1)
    recorder = SequenceRecorder(model, WANTED)
    with model.hooks(fwd_hooks=recorder.fwd_hooks):
        model(torch.cat(rows, 1), packed=lengths)
    packed = recorder.take()
    padded = torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)
    with model.hooks(fwd_hooks=recorder.fwd_hooks):
        model(padded, n_real=lengths)
    for row, a, b in zip(rows, packed, recorder.take(), strict=True):
        want = replayed(model, row[0].tolist())
        for name in WANTED:
            torch.testing.assert_close(a[name].float(), want[name].float(), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(b[name].float(), want[name].float(), rtol=1e-3, atol=1e-4)
