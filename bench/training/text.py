"""Tokenizers with one token a word, and two tiny text encoders of the classes that FLUX has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

CAPTION_TOKENS = 20
"""T5 tokens of a caption with its end: what `max_sequence_length` need be in the pipeline."""
CLIP_TOKENS = 24
CLIP: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "projection_dim": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": CLIP_TOKENS,
}
T5: dict[str, Any] = {
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}


def t5_tokenizer(words: Sequence[str]) -> T5Tokenizer:
    """A T5 tokenizer whose pieces are the words; any other word is unknown to it."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -20.0)]
    pieces += [(f"▁{word}", -1.0) for word in words]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=CAPTION_TOKENS)


def clip_tokenizer(words: Sequence[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make every word one token.

    Byte pairs are counted here and ties are broken by spelling: the trainer of `tokenizers` numbers
    its tokens differently in every process.
    """
    spelled = [(*word[:-1], f"{word[-1]}</w>") for word in words]
    alphabet = sorted({letter for symbols in spelled for letter in symbols})
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for symbols in spelled for pair in pairwise(symbols)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merged(symbols, best) for symbols in spelled]
    tokens = ["<|startoftext|>", "<|endoftext|>", *alphabet, *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_TOKENS)


def _merged(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    result: list[str] = []
    for symbol in symbols:
        if result and (result[-1], symbol) == pair:
            result[-1] += symbol
        else:
            result.append(symbol)
    return tuple(result)


def build_text_encoders(
    clip_words: CLIPTokenizer, t5_words: T5Tokenizer
) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Untrained encoders for the two vocabularies."""
    clip = CLIPTextConfig(
        **CLIP,
        vocab_size=len(clip_words),
        bos_token_id=clip_words.bos_token_id,
        eos_token_id=clip_words.eos_token_id,
        pad_token_id=clip_words.pad_token_id,
    )
    t5 = T5Config(**T5, vocab_size=len(t5_words))
    return CLIPTextModel(clip), T5EncoderModel(t5)


def token_ids(tokenizer: CLIPTokenizer | T5Tokenizer, captions: list[str], length: int) -> Tensor:
    """Ids as FLUX's pipeline asks for them: (N, length), padded, no mask."""
    ids: Tensor = tokenizer(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids.to(torch.long)
