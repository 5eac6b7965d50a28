"""Stand-ins for tokenizers and image processors: what pipelines ask of the real ones."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from wanlab.core.errors import WanlabError
from wanlab.models import get, load
from wanlab.models.standins import WordHashTokenizer, image_processor_for, tokenizer_for


@pytest.fixture
def tokenizer():
    return WordHashTokenizer(vocab_size=256, model_max_length=16)


def test_texts_are_padded_as_asked(tokenizer):
    texts = ["a red ball", "a"]
    assert [len(row) for row in tokenizer(texts)["input_ids"]] == [4, 2]
    assert tokenizer(texts, padding="longest", return_tensors="pt").input_ids.shape == (2, 4)
    assert tokenizer(texts, padding="max_length", return_tensors="pt").input_ids.shape == (2, 16)
    left = tokenizer(texts, padding=True, return_tensors="pt")
    tokenizer.padding_side = "left"
    assert tokenizer(texts, padding=True, return_tensors="pt").attention_mask.tolist()[1] == [0, 0, 1, 1]
    assert left.attention_mask.tolist()[1] == [1, 1, 0, 0]


def test_a_side_may_be_given_with_the_call(tokenizer):
    made = tokenizer(["a red ball", "a"], padding=True, padding_side="left", return_tensors="pt")
    assert made.attention_mask.tolist()[1] == [0, 0, 1, 1]


def test_only_truncation_cuts(tokenizer):
    long = "word " * 40
    assert len(tokenizer(long)["input_ids"]) == 41
    cut = tokenizer(long, truncation=True, max_length=9)["input_ids"]
    assert (len(cut), cut[-1]) == (9, tokenizer.eos_token_id)


def test_what_was_cut_can_be_said(tokenizer):
    ids = tokenizer(["A red ball moves left"], padding="longest", return_tensors="pt").input_ids
    assert tokenizer.batch_decode(ids[:, 2:-1]) == ["ball moves left"]


def test_special_tokens_have_ids_of_their_own(tokenizer):
    special = [f"<|{word}|>" for word in ("start_header_id", "end_header_id", "eot_id", "im_start")]
    ids = tokenizer.convert_tokens_to_ids(special)
    words = {tokenizer.convert_tokens_to_ids(f"word{i}") for i in range(500)}
    assert len(set(ids)) == len(special)
    assert not words & {*ids, tokenizer.pad_token_id, tokenizer.eos_token_id}
    assert max(words | set(ids)) < tokenizer.vocab_size


@pytest.mark.parametrize("name", ["tiny-hunyuan-t2v", "tiny-hunyuan-i2v"])
def test_a_prompt_begins_where_its_template_is_cut_off(name):
    pipeline = load(name, weights="random", device="cpu").pipeline
    template = sys.modules[type(pipeline).__module__].DEFAULT_PROMPT_TEMPLATE
    ids = pipeline.tokenizer(template["template"].format("a red ball"))["input_ids"]
    words = pipeline.tokenizer("a red ball", add_special_tokens=False)["input_ids"]
    assert ids[template["crop_start"] :][: len(words)] == words


def test_a_picture_has_its_token_where_the_pipeline_expects_it():
    pipeline = load("tiny-hunyuan-i2v", weights="random", device="cpu").pipeline
    template = sys.modules[type(pipeline).__module__].DEFAULT_PROMPT_TEMPLATE
    ids = pipeline.tokenizer(template["template"].format("a"))["input_ids"]
    assert ids.index(pipeline.text_encoder.config.image_token_index) == template["image_emb_start"]


def test_the_end_of_a_text_is_where_clip_looks_for_it():
    """CLIP's configuration names an end token; older ones name 2 and take the highest id of a text."""
    spec = get("tiny-hunyuan-t2v")
    parts = [
        dataclasses.replace(part, config=dict(part.config) | {"eos_token_id": 2, "bos_token_id": 0})
        if part.name == "text_encoder_2"
        else part
        for part in spec.parts
    ]
    for made in (spec, dataclasses.replace(spec, parts=tuple(parts))):
        tokenizer = tokenizer_for(made, "tokenizer_2")
        ids = tokenizer("a red ball", padding="max_length", return_tensors="pt").input_ids[0]
        assert ids.shape == (77,)
        assert int(ids.argmax()) == 4
    assert (
        tokenizer_for(spec, "tokenizer_2").eos_token_id == spec.part("text_encoder_2").config["eos_token_id"]
    )


def test_a_chat_becomes_text_and_tokens(tokenizer):
    chat = [{"role": "user", "content": [{"type": "text", "text": "a red ball"}]}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\na red ball<|im_end|>\n<|im_start|>assistant\n"
    made = tokenizer.apply_chat_template([chat, chat], padding="max_length", return_tensors="pt")
    assert made.input_ids.shape == (2, 16)


def test_a_text_encoder_without_a_vocabulary_is_refused():
    spec = get("tiny-mochi")
    parts = tuple(dataclasses.replace(part, config={}) for part in spec.parts)
    with pytest.raises(WanlabError, match="text_encoder has no vocab_size"):
        tokenizer_for(dataclasses.replace(spec, parts=parts), "tokenizer")


@pytest.mark.parametrize(
    ("name", "part", "side"),
    [
        ("tiny-wan2.1-i2v", "image_processor", 224),
        ("tiny-hunyuan-i2v", "image_processor", 336),
        ("tiny-hunyuan1.5-i2v", "feature_extractor", 384),
    ],
)
def test_pictures_have_the_size_of_the_vision_network(name, part, side):
    import numpy as np

    pipeline = load(name, weights="random", device="cpu").pipeline
    picture = np.zeros((48, 96, 3), np.uint8)
    made = getattr(pipeline, part)(picture, return_tensors="pt").pixel_values
    assert made.shape == (1, 3, side, side)


def test_a_model_without_a_vision_network_has_no_processor():
    assert image_processor_for(get("tiny-wan2.2-i2v")) is None
