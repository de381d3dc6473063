"""The pocket world's tokenizer: CLIP's byte-pair encoding, trained on the world's own words.

Every word of a caption, and each reserved identifier, is one token; any other text still encodes, letter by letter.
"""

from __future__ import annotations

import json
from pathlib import Path

from ibkit.pocket.world import vocabulary

CONTEXT_TOKENS = 24


def save_tokenizer(folder: Path):
    """Write a CLIP tokenizer to `folder` and return it (`transformers.CLIPTokenizer`)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, CLIPTokenizer

    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator(vocabulary(), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *dict.fromkeys("".join(pair) for pair in merges)]
    tokens = [
        *dict.fromkeys(tokens),
        "<|startoftext|>",
        "<|endoftext|>",
    ]  # CLIP pools at the highest id: the end of text comes last
    tokenizer = CLIPTokenizer(
        vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=CONTEXT_TOKENS
    )
    tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    broken = [w for w in vocabulary() if len(tokenizer(w)["input_ids"]) != 3]
    if broken or len(tokenizer) != len(tokens):
        raise RuntimeError(f"the pocket tokenizer splits {broken[:5]} ({len(tokenizer)} of {len(tokens)} tokens)")
    return tokenizer
