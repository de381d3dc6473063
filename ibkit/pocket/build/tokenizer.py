"""The pocket world's tokenizer: CLIP's byte-pair encoding, trained on the world's own words.

Every word of a caption and each reserved identifier is one token; any other text is encoded letter by letter.
"""

from collections import Counter
from itertools import pairwise
from pathlib import Path

from ibkit.pocket.words import vocabulary

CONTEXT_TOKENS = 24


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016, algorithm 1) until every word is one token.

    The most frequent pair comes first, ties in alphabetical order. The `tokenizers` library breaks ties in an order
    that changes from process to process, so that two stages of a build would encode a caption differently.
    """
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(symbols) > 1 for symbols in split):
        pairs = Counter(pair for symbols in split for pair in pairwise(symbols))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for symbols in split:
            for i in range(len(symbols) - 1):
                if tuple(symbols[i : i + 2]) == best:
                    symbols[i : i + 2] = ["".join(best)]
    return merges


def save_tokenizer(folder: Path):
    """Write a CLIP tokenizer to `folder` and return it (`transformers.CLIPTokenizer`)."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, CLIPTokenizer

    merges = learn_merges(vocabulary())
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    # CLIP pools at the highest id: the end of text comes last
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT_TOKENS).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    broken = [w for w in vocabulary() if len(tokenizer(w)["input_ids"]) != 3]
    if broken or len(tokenizer) != len(tokens):
        raise RuntimeError(f"the pocket tokenizer splits {broken[:5]} ({len(tokenizer)} of {len(tokens)} tokens)")
    return tokenizer
