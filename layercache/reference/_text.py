"""A word-level tokenizer and text encoder with the interface that `QwenImagePipeline` calls."""

from __future__ import annotations

import difflib
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from layercache.errors import UnknownWordError
from layercache.reference._scenes import WORDS

PAD_ID = 0
START_ID = 1
_FIRST_WORD_ID = 2


class TokenBatch(dict[str, Tensor]):
    """`input_ids` and `attention_mask`, both (batch, length), as keys and as attributes."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: Any) -> TokenBatch:
        return TokenBatch({name: tensor.to(device) for name, tensor in self.items()})


class WordTokenizer:
    """One token a word of `layercache.reference._scenes.WORDS`, after a start token.

    The empty caption is the start token alone: the unconditional branch.
    """

    def __init__(self) -> None:
        self.ids = {word: index + _FIRST_WORD_ID for index, word in enumerate(WORDS)}

    def encode(self, text: str) -> list[int]:
        """Token ids of one caption. Raises `UnknownWordError` for a word outside the vocabulary."""
        ids = [START_ID]
        for word in text.lower().replace(",", " ").split():
            if word not in self.ids:
                close = difflib.get_close_matches(word, WORDS, n=3)
                hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
                raise UnknownWordError(
                    f"the reference model does not know the word {word!r} in {text!r}: {hint}"
                    f"Its words are: {', '.join(sorted(WORDS))}."
                )
            ids.append(self.ids[word])
        return ids

    def __call__(
        self, text: str | list[str], max_length: int | None = None, **_: Any
    ) -> TokenBatch:
        rows = [self.encode(t) for t in ([text] if isinstance(text, str) else text)]
        length = max(len(row) for row in rows)
        if max_length is not None and length > max_length:
            raise UnknownWordError(
                f"a caption has {length} tokens, more than max_length={max_length}: shorten it"
            )
        ids = torch.full((len(rows), length), PAD_ID, dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
        return TokenBatch(input_ids=ids, attention_mask=(ids != PAD_ID).long())


class WordEncoder(ModelMixin, ConfigMixin):
    """A trained embedding per word; the transformer's own text stream does the rest."""

    @register_to_config
    def __init__(self, vocabulary_size: int = len(WORDS) + _FIRST_WORD_ID, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, width)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = True,
    ) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=(self.embedding(input_ids),))
