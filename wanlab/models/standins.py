"""Stand-ins for tokenizers and image processors whose files are not on this machine."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import BatchEncoding, CLIPImageProcessor
from transformers.image_processing_utils import BaseImageProcessor

from wanlab.core.errors import WanlabError
from wanlab.models.spec import ModelSpec

# A special token, a line break, a space before a number (which byte-level BPE keeps apart), a word, or a sign.
# So a prompt template has as many tokens as with the real tokenizer, and pipelines cut it off at the right place.
_PIECE = re.compile(r"<[^<>\s]+>|\n+|\s(?=\d)|\w+|[^\w\s]")
_SPECIAL = re.compile(r"<[^<>\s]+>")

# What tokenizers put around a text, (begin, end), by the start of their class name or that of the text encoder.
_AROUND = {
    "CLIP": (True, True),
    "Gemma": (True, False),
    "Llama": (True, False),
    "Llava": (True, False),
    "Qwen": (False, False),
}
_ENDED = (False, True)  # T5 and its relatives
_CLIP_EOS = (
    2  # of published configurations from before transformers 4.31, where the id is that of the last word
)


class WordHashTokenizer:
    """Replaces a `transformers` tokenizer: hashes words to token ids, with the same calls.

    The ids have no meaning, which does not matter with random weights; lengths, padding, mask and the place of special
    tokens are right.

    Args:
        vocab_size: ids are below it.
        model_max_length: length of a text that is padded or cut without a `max_length`.
        bos_token_id, eos_token_id: put before and after each text; None for nothing.
        pad_token_id: fills a text up.
        special: ids of special tokens that a network knows, e.g. `{"<image>": 5}`. Others get ids from the end of
            the vocabulary in the order in which they appear.
    """

    first_word_id = 3

    def __init__(
        self,
        vocab_size: int,
        model_max_length: int = 512,
        *,
        bos_token_id: int | None = None,
        eos_token_id: int | None = 1,
        pad_token_id: int = 0,
        special: Mapping[str, int] | None = None,
    ):
        self.vocab_size = vocab_size
        self.model_max_length = model_max_length
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.padding_side = "right"
        self.pad_token, self.eos_token = "<pad>", "</s>"
        self.added_tokens_encoder: dict[str, int] = {}  # where textual inversion looks for its words
        self._special = dict(special or {})
        self._words: dict[int, str] = {}
        kept = [bos_token_id, eos_token_id, pad_token_id, *self._special.values()]
        self._kept = {id_ for id_ in kept if id_ is not None}

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        padding_side: str | None = None,
        **_: object,
    ) -> BatchEncoding:
        """`input_ids` and `attention_mask`: int64 `[B, tokens]` for `return_tensors="pt"`, else lists.

        Texts are padded only if asked to: `padding="longest"` (or True) to the longest, `"max_length"` to `max_length`.
        """
        texts = [text] if isinstance(text, str) else list(text)
        limit = max_length or self.model_max_length
        rows = [self._ids(item, limit if truncation else None, add_special_tokens) for item in texts]
        length = {"max_length": limit, "longest": max(map(len, rows)), True: max(map(len, rows))}.get(
            padding, 0
        )
        left = (padding_side or self.padding_side) == "left"
        masks = [_padded([1] * len(row), length, 0, left) for row in rows]
        rows = [_padded(row, length, self.pad_token_id, left) for row in rows]
        if return_tensors == "pt":
            return BatchEncoding({"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)})
        single = isinstance(text, str)
        return BatchEncoding(
            {
                "input_ids": rows[0] if single else rows,
                "attention_mask": masks[0] if single else masks,
            }
        )

    def tokenize(self, text: str, **_: object) -> list[str]:
        """The pieces of a text, each of which gets an id."""
        return [piece if _SPECIAL.fullmatch(piece) else piece.lower() for piece in _PIECE.findall(text)]

    def encode(self, text: str, **options: Any) -> list[int]:
        """The ids of one text."""
        return self(text, **options)["input_ids"]

    def decode(self, ids: Iterable[int] | torch.Tensor, **_: object) -> str:
        """The words of ids that this tokenizer gave before; nothing for padding and ids that it never gave."""
        words = [self._words[id_] for id_ in _numbers(ids) if id_ in self._words]
        return " ".join(words)

    def batch_decode(self, batch: Iterable[Any], **_: object) -> list[str]:
        """`decode` of each row."""
        return [self.decode(row) for row in batch]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """The id of a token, or the ids of several."""
        return self._id(tokens) if isinstance(tokens, str) else [self._id(token) for token in tokens]

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        """Conversations as text, or its tokens, in the form of ChatML; one conversation or a batch of them."""
        batch = bool(conversation) and not isinstance(conversation[0], Mapping)
        texts = [
            _chat(messages, add_generation_prompt) for messages in (conversation if batch else [conversation])
        ]
        if not tokenize:
            return texts if batch else texts[0]
        made = self(texts if batch or options.get("return_tensors") else texts[0], **options)
        return made if return_dict else made["input_ids"]

    def _ids(self, text: str, limit: int | None, around: bool) -> list[int]:
        before = [self.bos_token_id] if around and self.bos_token_id is not None else []
        after = [self.eos_token_id] if around and self.eos_token_id is not None else []
        pieces = self.tokenize(text)
        room = len(pieces) if limit is None else max(limit - len(before) - len(after), 0)
        return [*before, *map(self._id, pieces[:room]), *after]

    def _id(self, piece: str) -> int:
        if piece in (self.pad_token, self.eos_token):
            found = self.pad_token_id if piece == self.pad_token else self.eos_token_id
            return self.pad_token_id if found is None else found
        if _SPECIAL.fullmatch(piece):
            if piece not in self._special:
                taken = self._kept | set(self._special.values())
                self._special[piece] = next(
                    id_ for id_ in range(self.vocab_size - 1, -1, -1) if id_ not in taken
                )
            id_ = self._special[piece]
        else:
            # The last eighth of the vocabulary is for special tokens.
            span = max(self.vocab_size - self.vocab_size // 8 - self.first_word_id, 1)
            start = zlib.crc32(piece.encode()) % span
            id_ = next(i for i in _around(start, span, self.first_word_id) if i not in self._kept)
        self._words[id_] = piece
        return id_


def tokenizer_for(spec: ModelSpec, name: str) -> WordHashTokenizer:
    """The stand-in for `tokenizer` or `tokenizer_2` of a model, from the configuration of the text encoder it serves."""
    part = spec.part(name.replace("tokenizer", "text_encoder"))
    config = part.config
    text = dict(config) | dict(config.get("text_config") or {})
    vocab = text.get("vocab_size")
    if not isinstance(vocab, int):
        raise WanlabError(
            f"{spec.source}: config.json of {part.name} has no vocab_size, so no tokenizer can stand in;"
            " give a folder with the tokenizer's files"
        )
    classes = (str((spec.model_index.get(name) or [None, ""])[1]), part.class_name)
    begin, end = next(
        (_AROUND[start] for cls in classes for start in _AROUND if cls.startswith(start)), _ENDED
    )
    bos, eos, pad = (_one(text.get(f"{kind}_token_id")) for kind in ("bos", "eos", "pad"))
    if begin and end and eos in (None, _CLIP_EOS):
        bos, eos, pad = vocab - 2, vocab - 1, vocab - 1
    image = config.get("image_token_index", config.get("image_token_id"))
    return WordHashTokenizer(
        vocab,
        # Where positions are learned they end; rotary and relative ones go on, and the pipeline's length counts.
        int(text.get("max_position_embeddings") or spec.defaults.text_tokens),
        bos_token_id=(vocab - 2 if bos is None else bos) if begin else None,
        eos_token_id=(1 if eos is None else eos) if end else None,
        pad_token_id=0 if pad is None else pad,
        special={} if image is None else {"<image>": image},
    )


def image_processor_for(spec: ModelSpec, cls: Any = None) -> Any:
    """A processor that gives pictures of the size that the model's vision network takes; None where it has none.

    The network is the image encoder, or a text encoder that also reads pictures.

    Args:
        spec: facts of the model.
        cls: the processor's class; anything that is no image processor (`CLIPProcessor`) stands for CLIP's.
    """
    side = next(iter(_image_sizes(spec)), None)
    if side is None:
        return None
    if not isinstance(cls, type) or not issubclass(cls, BaseImageProcessor):
        cls = CLIPImageProcessor
    square = {"height": side, "width": side}
    shortest = "shortest_edge" in (getattr(cls, "size", None) or {})
    return cls(size={"shortest_edge": side}, crop_size=square) if shortest else cls(size=square)


def _image_sizes(spec: ModelSpec) -> Iterator[int]:
    """Sizes of pictures in the configurations of networks, that of the image encoder first."""
    parts = [part for part in spec.parts if part.library == "transformers"]
    for part in sorted(parts, key=lambda part: not part.name.startswith("image_encoder")):
        for config in (part.config.get("vision_config") or {}, part.config):
            if config.get("image_size") is not None:
                yield int(config["image_size"])


def _padded(row: list[int], length: int, value: int, left: bool) -> list[int]:
    filling = [value] * (length - len(row))
    return filling + row if left else row + filling


def _around(start: int, span: int, first: int) -> Iterator[int]:
    """All ids of a range, beginning somewhere in it."""
    return (first + (start + step) % span for step in range(span))


def _numbers(ids: Any) -> list[int]:
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    return [int(value) for value in ([values] if isinstance(values, int) else values)]


def _one(value: Any) -> int | None:
    """The first of several ids; None stays."""
    if isinstance(value, list | tuple):
        value = next(iter(value), None)
    return None if value is None else int(value)


def _chat(messages: Sequence[Mapping[str, Any]], generation: bool) -> str:
    turns = [f"<|im_start|>{turn['role']}\n{_content(turn['content'])}<|im_end|>\n" for turn in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if generation else "")


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(str(item.get("text", "")) for item in content)
