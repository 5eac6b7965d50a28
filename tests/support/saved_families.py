"""Tiny models of the families: the inputs that their pipelines take, and folders with real tokenizers."""

from __future__ import annotations

import inspect
import json
import string
import sys
from dataclasses import asdict
from pathlib import Path

COUNTS = ("num_frames", "frames", "video_length", "segment_frame_length")
"""What pipelines call the number of frames."""

_CHAT = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n"
    "{% if turn.content is string %}{{ turn.content }}"
    "{% else %}{% for item in turn.content %}{{ item.text }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>")


def inputs(model, *, prompt: str = "a cat", seed: int = 0, **changes) -> dict:
    """Arguments for `model.pipeline(...)`: the model's default sizes, and every picture that its call asks for."""
    import numpy as np
    import torch
    from PIL import Image

    shape = model.spec.defaults
    noise = np.random.default_rng(0).integers(0, 256, (shape.height, shape.width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    given = {
        "prompt": prompt,
        "negative_prompt": "",
        "height": shape.height,
        "width": shape.width,
        **dict.fromkeys(COUNTS, shape.frames),
        "num_inference_steps": shape.steps,
        "guidance_scale": shape.guidance_scale,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "np",
        "image": image,
        "pose_video": [image] * shape.frames,
        "face_video": [image] * shape.frames,
        "use_resolution_binning": False,
    }
    accepted = inspect.signature(type(model.pipeline).__call__).parameters
    if "image" not in accepted:
        given["video"] = [image] * shape.frames
    # Twice the positions of one picture: the transformer takes the last frame too.
    denoiser = getattr(model.pipeline, "transformer", None)
    if denoiser is not None and denoiser.config.get("pos_embed_seq_len"):
        given["last_image"] = image
    return {key: value for key, value in (given | changes).items() if key in accepted}


def save_tiny(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a tiny model as diffusers writes it, with tokenizers made here, and its default settings beside it."""
    from wanlab import models

    model = models.load(name, weights="random", device="cpu", seed=seed)
    pipeline = model.pipeline
    for part, entry in model.spec.model_index.items():
        if part.startswith("tokenizer"):
            encoder = model.spec.part(part.replace("tokenizer", "text_encoder"))
            made = _tokenizer(entry[1], encoder.config, model.spec.defaults.text_tokens, pipeline)
            pipeline.register_modules(**{part: made})
    pipeline.save_pretrained(folder)
    defaults = {key: value for key, value in asdict(model.spec.defaults).items() if value is not None}
    (Path(folder) / "wanlab.json").write_text(json.dumps({"defaults": defaults}))
    return Path(folder)


def _tokenizer(class_name: str, config, length: int, pipeline):
    import transformers

    if class_name.startswith("ByT5"):
        return transformers.ByT5Tokenizer(model_max_length=length)
    if class_name.startswith("T5"):
        return _unigram(length)
    if class_name.startswith("CLIP"):
        return _clip(config["vocab_size"], config["max_position_embeddings"])
    text = dict(config) | dict(config.get("text_config") or {})
    # Sources hold the prompt templates, so that these stay short.
    corpus = [inspect.getsource(sys.modules[type(pipeline).__module__])]
    # Qwen's configuration names a first token that its tokenizer does not write.
    tokenizer = _byte_pairs(text, corpus, begin=not class_name.startswith("Qwen"))
    if class_name.endswith("Processor"):
        return getattr(transformers, class_name)(
            image_processor=transformers.Qwen2VLImageProcessor(),
            video_processor=transformers.Qwen2VLVideoProcessor(),
            tokenizer=tokenizer,
            chat_template=_CHAT,
        )
    return tokenizer


def _unigram(length: int):
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = ["a", "the", "cat", "walks", "camera", "pans", "left", "red", "ball", "moves"]
    characters = ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    vocabulary = [(f"▁{word}", -2.0) for word in words] + [(sign, -4.0) for sign in characters]
    return T5Tokenizer(vocab=special + vocabulary, extra_ids=0, model_max_length=length)


def _clip(size: int, length: int):
    """Printable ASCII, pairs of letters to fill the vocabulary, and the two ends as its last ids, as CLIP has them."""
    from transformers import CLIPTokenizer

    signs = [chr(code) for code in range(33, 127)]
    vocabulary = signs + [f"{sign}</w>" for sign in signs]
    pairs = [(a, b) for a in string.ascii_lowercase for b in string.ascii_lowercase]
    pairs = pairs[: size - 2 - len(vocabulary)]
    vocabulary += [a + b for a, b in pairs]
    ids = {piece: i for i, piece in enumerate([*vocabulary, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=ids, merges=pairs, model_max_length=length)


def _byte_pairs(text, corpus: list[str], *, begin: bool):
    """Byte-level BPE as Llama 3 and Qwen have it, with special tokens at the ids that the text encoder's config states."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    stated = {
        key: text.get(f"{name}")
        for key, name in (
            ("<bos>", "bos_token_id"),
            ("<eos>", "eos_token_id"),
            ("<pad>", "pad_token_id"),
            ("<image>", "image_token_index"),
        )
        if text.get(name) is not None
    }
    splitting = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\n+| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = splitting
    room = text["vocab_size"] - len(stated) - len(_SPECIAL)
    ascii_only = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    corpus = ["".join(sign for sign in item if sign.isascii()) for item in corpus]
    trainer = trainers.BpeTrainer(vocab_size=room, initial_alphabet=ascii_only, show_progress=False)
    trained.train_from_iterator(corpus, trainer)
    model = json.loads(trained.to_str())["model"]
    taken = set(stated.values())
    free = (i for i in range(text["vocab_size"]) if i not in taken)
    ids = {piece: next(free) for piece in model["vocab"]} | {piece: next(free) for piece in _SPECIAL} | stated
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[tuple(pair) for pair in model["merges"]]))
    tokenizer.pre_tokenizer, tokenizer.decoder = splitting, decoders.ByteLevel()
    tokenizer.add_special_tokens([*_SPECIAL, *stated])
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>" if begin else None,
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=_CHAT,
        model_max_length=text["max_position_embeddings"],
        padding_side="right",
    )
