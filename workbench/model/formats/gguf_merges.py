"""The vocabulary as GGUF holds it: tokens in GPT-2's characters, and the merges that byte-pair encoding applies.

o200k_harmony is published as ranked tokens; each token's merge is the last step of its own encoding with the tokens of
lower rank.
"""

from collections.abc import Collection, Sequence
from itertools import pairwise

from workbench.harmony.vocabulary import Tokenizer


def vocabulary_tokens(tokenizer: Tokenizer, d_vocab: int) -> list[str]:
    """Return the token of every row of the embedding; rows without a token are called [PAD…]."""
    return [tokenizer.printable(id) if id < tokenizer.d_vocab else f"[PAD{id}]" for id in range(d_vocab)]


def merges(tokens: Sequence[str], special: Collection[int]) -> list[str]:
    """Return the merges in the order of the tokens that they make, each as two tokens with a space between them.

    Tokens that no merge of lower tokens makes have none.
    """
    ranks = {token: id for id, token in enumerate(tokens) if id not in special}
    lines = []
    for token, rank in ranks.items():
        pieces = list(token)
        while len(pieces) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in pairwise(pieces)]
            at = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[at] >= rank:
                break
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        if len(pieces) == 2 and all(piece in ranks for piece in pieces):
            lines.append(" ".join(pieces))
    return lines


def unmerged(tokens: Sequence[str], special: Collection[int], made: Collection[str]) -> list[int]:
    """Return the ids of tokens of several characters that none of the merges `made` gives."""
    results = {merge.replace(" ", "") for merge in made}
    return [id for id, token in enumerate(tokens) if len(token) > 1 and id not in special and token not in results]
