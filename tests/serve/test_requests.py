"""Hostile requests: each is refused with a code of the caller's side and one line, and the service goes on."""

import json
import os
import random
import struct
import time
import zlib

import psutil
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from support.services import MODEL, Client, data_url, picture, settings

from wanlab.serve.requests import FIELDS, Refused, json_fields, read_request
from wanlab.serve.running import served
from wanlab.serve.settings import ModelFacts

OWN = settings("unused", max_body_mib=1.0)
FACTS = ModelFacts(
    name=MODEL, needs={"image": "picture"}, fps=16, steps=2, guidance_scale=3.5, sizes=((64, 64, 9),), any_size=False,
    size_step=(16, 16), frame_step=4, fewest_steps=1, max_batch=4, alone="", versions={},
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.binary(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
GOOD = {"prompt": "a cat", "input_reference": data_url(picture())}
SECONDS = 5.0


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width=60_000, height=60_000):
    """A PNG of some kB whose pixels fill gigabytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


@effort(max_examples=300)
@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=10), VALUES, max_size=5))
def test_any_fields_are_read_or_refused(fields):
    refusal = None
    try:
        order, png, _ = read_request({**GOOD, **fields}, FACTS, OWN)
    except Refused as error:
        refusal = error
    if refusal is not None:
        assert refusal.status in (400, 404, 413)
        assert "\n" not in refusal.message
        return
    assert (order.width, order.height, order.frames) == (64, 64, 9)
    assert png.startswith(b"\x89PNG")
    json.dumps(order.settings(), allow_nan=False)


@effort(max_examples=200)
@given(st.binary(max_size=200))
def test_any_body_is_json_or_refused(body):
    status = 200
    try:
        assert isinstance(json_fields(body), dict)
    except Refused as error:
        status = error.status
    assert status in (200, 400)


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"prompt": None}, 400, "prompt is missing"),
        ({"prompt": "\ud800"}, 400, "surrogate"),
        ({"prompt": "x" * 20_000}, 413, "characters"),
        ({"promt": "a"}, 400, "did you mean 'prompt'"),
        ({"model": "gpt"}, 404, "not served"),
        ({"size": "64x64x64"}, 400, "WIDTHxHEIGHT"),
        ({"size": "1280x720"}, 400, "not served"),
        ({"num_inference_steps": 0}, 400, "from 1 to 100"),
        ({"num_inference_steps": True}, 400, "whole number"),
        ({"guidance_scale": float("nan")}, 400, "from 0 to 100"),
        ({"seed": 10**5000}, 400, "bits"),
        ({"seed": -1}, 400, "from 0"),
        ({"fps": 30}, 400, "frames per second"),
        ({"input_reference": None}, 400, "from a picture"),
        ({"input_reference": "no base64!"}, 400, "no base64"),
        ({"input_reference": data_url(b"GIF89a")}, 400, "no picture"),
        ({"input_reference": data_url(picture()[:-300])}, 400, "input_reference"),
        ({"input_reference": data_url(bomb())}, 413, "pixels"),
        ({"input_reference": data_url(bomb(6_000, 6_000))}, 400, "input_reference"),
        ({"input_reference": {"image_url": 3}}, 400, "must be a file"),
    ],
)
def test_a_wrong_request_is_refused_in_little_time_and_memory(fields, status, said):
    before, begin = psutil.Process().memory_info().rss, time.monotonic()
    with pytest.raises(Refused) as refused:
        read_request({**GOOD, **fields}, FACTS, OWN)
    assert (refused.value.status, said in refused.value.message) == (status, True), refused.value.message
    assert time.monotonic() - begin < SECONDS
    assert psutil.Process().memory_info().rss - before < 400 * 2**20


def mutated(chance):
    """Arguments of a hostile request: damaged JSON, forms, pictures, headers, paths and methods."""
    body = json.dumps({**GOOD, "num_inference_steps": 1}).encode()
    kind = chance.randrange(9)
    headers = {"content-type": "application/json"}
    if kind == 0:  # damaged bytes of a good body
        text = bytearray(body)
        for _ in range(chance.randrange(1, 20)):
            text[chance.randrange(len(text))] = chance.randrange(256)
        return ("POST", "/v1/videos", bytes(text), headers)
    if kind == 1:
        name = chance.choice(FIELDS)
        values = [
            None,
            True,
            -1,
            1e308,
            10**400,
            "",
            "\0",
            "\x1b[2J",
            [],
            {},
            [[[]]],
            "9" * 5000,
            "x" * 30_000,
            {"image_url": []},
        ]
        return ("POST", "/v1/videos", json.dumps({**GOOD, name: chance.choice(values)}).encode(), headers)
    if kind == 2:
        form = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--b\r\nContent-Disposition: form-data;'
        form += (
            b' name="input_reference"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
            + picture()
            + b"\r\n--b--\r\n"
        )
        text = bytearray(form)
        for _ in range(chance.randrange(0, 30)):
            text[chance.randrange(260)] = chance.randrange(256)
        boundary = chance.choice(["b", "", "c", "b" * 500, '"b'])
        return (
            "POST",
            "/v1/videos",
            bytes(text),
            {"content-type": f"multipart/form-data; boundary={boundary}"},
        )
    if kind == 3:
        image = bytearray(picture(kind=chance.choice(["PNG", "JPEG", "WEBP"])))
        for _ in range(chance.randrange(1, 50)):
            image[chance.randrange(len(image))] = chance.randrange(256)
        sent = json.dumps({**GOOD, "num_inference_steps": 1, "input_reference": data_url(bytes(image))})
        return ("POST", "/v1/videos", sent.encode(), headers)
    if kind == 4:
        nested = chance.choice(
            [
                b"[" * 100_000,
                b'{"a":' * 50_000,
                b"",
                b"null",
                b"{}",
                b'"x"',
                b'{"prompt":NaN}',
                bytes(2**20 + 9),
            ]
        )
        return ("POST", "/v1/videos", nested, headers)
    if kind == 5:
        path = "/v1/videos/" + "".join(
            chance.choice("abc/.%0123456789_-'\"") for _ in range(chance.randrange(40))
        )
        return (chance.choice(["GET", "DELETE", "POST", "PUT", "HEAD", "PATCH"]), path, b"", {})
    if kind == 6:
        token = bytes(chance.randrange(33, 256) for _ in range(chance.randrange(1, 60)))
        return ("POST", "/v1/videos", body, {**headers, "authorization": b"Bearer " + token})
    if kind == 7:
        key = bytes(chance.randrange(32, 256) for _ in range(chance.randrange(300)))
        return ("POST", "/v1/videos", body[:-1], {**headers, "idempotency-key": b"k" + key + b"k"})
    return (
        "POST",
        "/v1/videos",
        body,
        {
            "content-type": chance.choice(
                ["", "text/plain", "application/xml", "multipart/form-data", "a/b" * 900]
            )
        },
    )


def fuzzed(folder, count):
    """Codes of `count` hostile requests, and growth of memory in MiB and of open files over the second half."""
    codes: dict[int, int] = {}
    process, middle = psutil.Process(), (0, 0)
    own = settings(folder, sizes=((64, 64, 9),), max_body_mib=1.0, queue=8, keep_s=2.0, warm_up=False)
    with served(own, ray=False) as running, Client(running.url) as client:
        for number in range(count):
            if number == count // 2:
                middle = process.memory_info().rss, process.num_fds()
            method, path, body, headers = mutated(random.Random(number))
            answer = client.request(method, path, content=body, headers=headers)
            codes[answer.status_code] = codes.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, (number, answer.text[:300])
            own_answer = answer.text != "Invalid HTTP request received."  # uvicorn's, of no legal HTTP
            if answer.status_code >= 400 and method != "HEAD" and own_answer:
                assert answer.json()["error"]["message"], number
        grown = (process.memory_info().rss - middle[0]) / 2**20, process.num_fds() - middle[1]
        assert client.get("/healthz").json() == {"status": "ready"}
        end = time.monotonic() + 60
        while client.submit("still here").status_code == 429:
            assert time.monotonic() < end
            time.sleep(0.2)
    return codes, grown


def test_hostile_requests_get_the_right_codes(tmp_path):
    codes, _ = fuzzed(tmp_path, 300)
    assert set(codes) <= {200, 400, 401, 404, 405, 409, 413, 415, 429}
    assert {200, 400, 401, 404, 413, 415} <= set(codes)


@pytest.mark.slow
def test_ten_thousand_hostile_requests_leave_nothing(tmp_path):
    codes, (grown_mib, files) = fuzzed(tmp_path, int(os.environ.get("WANLAB_REQUESTS", "10000")))
    print(dict(sorted(codes.items())), f"{grown_mib:.1f} MiB and {files} files more in the second half")
    assert set(codes) <= {200, 400, 401, 404, 405, 409, 413, 415, 429}
    assert grown_mib < 100
    assert files <= 10
