"""How often the tokens of two sides select each expert, within prompts and over all tokens, without each prompt group.

The tokens of a side are first counted by sequence and token id (`TokenSides`). A second pass over the tokens adds up
which experts they select, with the weights of every control at once (`selection_rates`).

Reference: SteerMoE, arXiv 2509.09660; Mantel & Haenszel 1959; Shao & Tu 1995, The Jackknife and Bootstrap.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse
from jaxtyping import Bool, Float, Int

from workbench.errors import InputError
from workbench.studies.matching import Matching, match_cells
from workbench.studies.run_index import MAX_TOKEN_IDS, Block, Cells, Control, TokenRun, token_blocks
from workbench.studies.token_labels import TOKEN_LABELS, mask, selection_text

GROUPS = 20  # of prompts; each is left out once, where prompts are not matched


class TokenSides:
    """The tokens of both sides, as counts by sequence and token id, and a second pass over them.

    Raises:
        InputError: a side has no token, or a token is on both sides.
    """

    def __init__(self, run: TokenRun, sides: tuple[Any, Any], number: Int[np.ndarray, " sequence"]) -> None:
        self.run, self.sides, self.number = run, sides, number
        names = [set(side) if isinstance(side, Mapping) else set() for side in sides]
        self._labels = tuple(sorted(set.union(*names) & (TOKEN_LABELS.keys() - {"channel"})))
        parts = [np.zeros((0, 3), dtype=np.int64)]
        for block, side in self.blocks():
            code = self.codes(block)
            for which in (0, 1):
                value, n = np.unique(code[side == which], return_counts=True)
                parts.append(np.stack([value, np.full(len(value), which), n], 1))
        rows = np.concatenate(parts)
        self.code, of = np.unique(rows[:, 0], return_inverse=True)
        counts = [np.bincount(of, rows[:, 2] * (rows[:, 1] == which), len(self.code)) for which in (0, 1)]
        self.counts: Int[np.ndarray, "side code"] = np.stack(counts).astype(np.int64)
        self.sequence, self.token = np.divmod(self.code, MAX_TOKEN_IDS)
        self.prompt = number[self.sequence]
        for which, side in enumerate(sides):
            if not self.counts[which].sum():
                raise InputError(
                    f"no token of the run is on side {'ab'[which]}, {selection_text(side)}: choose other labels"
                )

    def matching(self, control: Control) -> Matching:
        """Return the weights within prompts of the cells, those of side a before those of side b."""
        n = len(self.code)
        side, none = np.repeat([0, 1], n), np.zeros(2 * n, dtype=np.int64)
        twice = [np.tile(values, 2) for values in (self.code, self.sequence, self.token)]
        tokens = self.counts.ravel()
        cells = Cells(twice[0], twice[1], none, side, twice[2], tokens)
        has = [np.bincount(self.sequence, self.counts[which], int(self.sequence.max()) + 1) > 0 for which in (0, 1)]
        within = bool((has[0] & has[1]).any())
        return match_cells(cells, np.where(tokens > 0, side, -1), self.number, control, within_sequence=within)

    def blocks(self, *names: str) -> Iterator[tuple[Block, Int[np.ndarray, " token"]]]:
        """Yield blocks, and the side of each token: 0, 1, or −1 for neither.

        Raises:
            InputError: a token is on both sides.
        """
        for block in token_blocks(self.run, "risk difference", "id", *self._labels, *names):
            columns = pd.DataFrame({k: block[k] for k in ("sequence", "position", "channel", "id", *self._labels)})
            on = [mask(side, columns, self.run.sequences) for side in self.sides]
            if (on[0] & on[1]).any():
                raise InputError(
                    f"tokens are on both sides, {selection_text(self.sides[0])} and {selection_text(self.sides[1])}"
                )
            yield block, np.where(on[0], 0, np.where(on[1], 1, -1))

    def codes(self, block: Block) -> Int[np.ndarray, " token"]:
        """Return sequence and token id of every token as one number."""
        return np.asarray(block["sequence"].astype(np.int64) * MAX_TOKEN_IDS + block["id"].astype(np.int64))

    def groups(self, rng: np.random.Generator) -> Int[np.ndarray, " prompt"]:
        """Return the group of every prompt; prompts with the same sides are spread evenly over the groups."""
        n_prompts = int(self.number.max(initial=-1)) + 1
        has = self.prompts_of_sides()
        used = np.flatnonzero(has[0] | has[1])
        used = rng.permutation(used)
        used = used[np.argsort(has[0][used] * 2 + has[1][used], kind="stable")]
        group = np.zeros(n_prompts, dtype=np.int64)
        group[used] = np.arange(len(used)) % min(GROUPS, len(used))
        return group

    def prompts_of_sides(self) -> list[Bool[np.ndarray, " prompt"]]:
        """Return which prompts have tokens on either side."""
        n_prompts = int(self.number.max(initial=-1)) + 1
        return [np.bincount(self.prompt, self.counts[which], n_prompts) > 0 for which in (0, 1)]


@dataclass(frozen=True)
class TokenIdWeights:
    """The weight of a token of each token id on each side, with all groups of prompts and without each of them."""

    share: Float[np.ndarray, "side id config"]  # config 0: all groups
    total: Float[np.ndarray, " config"]
    id_index: Int[np.ndarray, " code"]  # of the code's token id in `share`
    group: Int[np.ndarray, " code"]
    tokens: tuple[int, int]

    @classmethod
    def of(cls, sides: TokenSides, groups: Int[np.ndarray, " prompt"], n_groups: int) -> "TokenIdWeights":
        """Return the weights; groups: of every prompt."""
        id_index = np.unique(sides.token, return_inverse=True)[1]
        n_ids, group = int(id_index.max()) + 1, groups[sides.prompt]
        own = [
            np.bincount(id_index * n_groups + group, sides.counts[side], n_ids * n_groups).reshape(n_ids, n_groups)
            for side in (0, 1)
        ]
        n = np.stack([np.concatenate([c.sum(1)[:, None], c.sum(1)[:, None] - c], axis=1) for c in own])
        both = n.sum(0)
        matched = np.divide(n[0] * n[1], both, out=np.zeros_like(both), where=both > 0)
        # a token of side a has n_b / (n_a + n_b), one of side b n_a / (n_a + n_b)
        share = np.divide(n[::-1], both, out=np.zeros_like(n), where=both > 0)
        used = matched[id_index, 0] > 0
        tokens = [int(sides.counts[side][used].sum()) for side in (0, 1)]
        return cls(share, matched.sum(0), id_index, group, (tokens[0], tokens[1]))

    def of_tokens(
        self, side: Int[np.ndarray, " token"], code: Int[np.ndarray, " token"]
    ) -> Float[np.ndarray, "token config"]:
        """Return the signed weights of tokens, given the index of each token's code."""
        share = self.share[side, self.id_index[code]] * np.where(side == 0, 1.0, -1.0)[:, None]
        out = np.divide(share, self.total, out=np.zeros(share.shape), where=self.total > 0)
        out[np.arange(len(side)), 1 + self.group[code]] = 0  # the token's own group is left out there
        return out


def selection_rates(
    sides: TokenSides, matchings: Mapping[str, Matching], weights: TokenIdWeights, groups: Int[np.ndarray, " prompt"]
) -> tuple[
    Float[np.ndarray, "side layer expert"],
    dict[str, Float[np.ndarray, "2 prompt layer expert"]],
    Float[np.ndarray, "config layer expert"],
    Float[np.ndarray, "config layer expert"],
]:
    """Return both sides' rates, matched differences and rates of side b by prompt, and differences of all tokens.

    The last two are pooled, and at the same token ids.

    These are with all groups of prompts, and without each.
    """
    model, n_groups, n = sides.run.model, len(weights.total) - 1, len(sides.code)
    layers, experts = model["n_layers"], model["num_experts"]
    selected = np.zeros((2, n_groups, layers, experts))
    same_ids = np.zeros((n_groups + 1, layers, experts))
    by_prompt = {name: np.zeros((2, len(groups), layers, experts)) for name in matchings}
    for block, side in sides.blocks("experts"):
        at = np.flatnonzero(side >= 0)
        code, own = np.searchsorted(sides.code, sides.codes(block)[at]), side[at]
        columns, cell = weights.of_tokens(own, code), own * n_groups + weights.group[code]
        present, local = np.unique(sides.prompt[code], return_inverse=True)
        matched = [[w[own * n + code] for w in (m.difference, m.side_b)] for m in matchings.values()]
        for layer, slots in enumerate(block["experts"]):
            chosen = slots[at].astype(np.int64)
            selected[:, :, layer] += _counted(chosen, cell, 2 * n_groups, experts).reshape(2, n_groups, experts)
            same_ids[:, layer] += _by_expert(chosen, columns, experts)
            for counts, weights_of in zip(by_prompt.values(), matched, strict=True):
                for sums, weight in zip(counts, weights_of, strict=True):
                    sums[present, layer] += _counted(chosen, local, len(present), experts, weight)
    same_ids[weights.total <= 0] = np.nan
    tokens = [np.bincount(weights.group, sides.counts[side], n_groups) for side in (0, 1)]
    rates = [_with_and_without(of_side, count) for of_side, count in zip(selected, tokens, strict=True)]
    return np.stack([rate[0] for rate in rates]), by_prompt, rates[0] - rates[1], same_ids


def _with_and_without(
    sums: Float[np.ndarray, "group layer expert"], tokens: Float[np.ndarray, " group"]
) -> Float[np.ndarray, "config layer expert"]:
    """Return sums over tokens with all groups, and without each; NaN where no token is left."""
    totals = np.concatenate([sums.sum(0)[None], sums.sum(0) - sums])
    count = np.concatenate([[tokens.sum()], tokens.sum() - tokens])[:, None, None]
    return np.divide(totals, count, out=np.full(totals.shape, np.nan), where=count > 0)


def _counted(
    chosen: Int[np.ndarray, "token slot"],
    row: Int[np.ndarray, " token"],
    n_rows: int,
    n_experts: int,
    weight: Float[np.ndarray, " token"] | None = None,
) -> Float[np.ndarray, "row expert"]:
    """Return the (weighted) number of tokens of each row that select each expert."""
    cell = (row[:, None] * n_experts + chosen).ravel()
    values = None if weight is None else np.repeat(weight, chosen.shape[1])
    return np.bincount(cell, values, n_rows * n_experts).reshape(n_rows, n_experts)


def _by_expert(
    chosen: Int[np.ndarray, "token slot"], columns: Float[np.ndarray, "token column"], n_experts: int
) -> Float[np.ndarray, "column expert"]:
    """Return the sums of the columns over the tokens that select each expert."""
    n, k = chosen.shape
    parts = (np.ones(n * k), chosen.ravel(), np.arange(0, n * k + 1, k))
    return np.asarray((scipy.sparse.csr_array(parts, shape=(n, n_experts)).T @ columns).T)
