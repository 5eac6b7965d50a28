"""A tokenizer for random weights, where the real one cannot be had."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import BatchEncoding


class WordHashTokenizer:
    """Hashes words into a vocabulary, with the call of a `transformers` tokenizer.

    The ids mean nothing, which is what random weights make of any ids; lengths, padding and mask are right.
    """

    pad_token_id, eos_token_id, first_word_id = 0, 1, 3

    def __init__(self, vocab_size: int, model_max_length: int = 512):
        self.vocab_size = vocab_size
        self.model_max_length = model_max_length

    def __call__(
        self, text: str | list[str], *, max_length: int | None = None, return_tensors: str = "pt", **_: object
    ) -> BatchEncoding:
        """`input_ids` and `attention_mask`, int64 `[B, max_length]`, truncated and padded on the right."""
        import torch
        from transformers import BatchEncoding

        length = min(max_length or self.model_max_length, self.model_max_length)
        texts = [text] if isinstance(text, str) else text
        ids = torch.full((len(texts), length), self.pad_token_id, dtype=torch.long)
        for row, words in enumerate(item.lower().split()[: length - 1] for item in texts):
            coded = [self._id(word) for word in words] + [self.eos_token_id]
            ids[row, : len(coded)] = torch.tensor(coded)
        return BatchEncoding({"input_ids": ids, "attention_mask": (ids != self.pad_token_id).long()})

    def _id(self, word: str) -> int:
        return self.first_word_id + zlib.crc32(word.encode()) % (self.vocab_size - self.first_word_id)
