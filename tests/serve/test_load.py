"""Loads on a real service: what is counted, both ways in turn, arrivals, and what is told where something is wrong."""

from __future__ import annotations

import numpy as np
import pytest
from support.services import MODEL, SIZE, data_url, picture, settings

from wanlab import heldout, models
from wanlab.core.errors import WanlabError
from wanlab.serve.load import Reply, arrivals, body_of, remote, send
from wanlab.serve.load_answer import load_answer
from wanlab.serve.load_test import ALONE, BATCHES, Load, LoadTest, load_test
from wanlab.serve.running import Served, served


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with served(settings(tmp_path_factory.mktemp("load"), queue=3), ray=False) as running:
        yield running


@pytest.fixture(scope="module")
def asked():
    model = models.load(MODEL, device="cpu", weights="random")
    width, height, frames = SIZE
    cases = heldout.load_cases("selection", 2)
    return heldout.ask(model, cases, height=height, width=width, frames=frames, steps=2)[0]


def bodies(count, **more):
    width, height, frames = SIZE
    own = {"prompt": "a cat", "size": f"{width}x{height}", "num_frames": frames, "num_inference_steps": 2}
    return [own | {"input_reference": data_url(picture(seed)), "seed": seed} | more for seed in range(count)]


def test_every_request_has_its_reply_with_the_parts_of_its_time(service):
    replies = send(service, bodies(3), at_once=2)
    assert [reply.status for reply in replies] == ["completed"] * 3
    for reply in replies:
        parts = reply.queue_wait_ms + reply.encode_ms + reply.denoise_ms + reply.decode_ms
        assert 0 < parts < 1.05 * reply.latency_ms + 20
    assert replies[2].sent_ms > min(replies[0].latency_ms, replies[1].latency_ms)  # two at a time


def test_a_full_queue_and_a_wrong_request_are_told(service):
    service.limit(1)
    replies = send(service, bodies(8, num_inference_steps=20), sent_s=[0.0] * 8)
    service.limit(None)
    refused = [reply for reply in replies if reply.status == "refused"]
    assert 1 <= len(refused) < 8
    assert "the queue is full" in refused[0].error
    (wrong,) = send(service, bodies(1, size="1x1"), at_once=1)
    assert wrong.status == "refused"
    assert "1x1" in wrong.error


def test_requests_are_sent_at_their_times(service):
    replies = send(service, bodies(2), sent_s=[0.0, 0.3])
    assert 290 < replies[1].sent_ms - replies[0].sent_ms < 600


def test_arrivals_of_a_poisson_process():
    times = np.array(arrivals(20_000, 4.0, seed=1))
    gaps = np.diff(times)
    assert times[0] > 0
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)  # as an exponential distribution
    assert arrivals(5, 4.0, seed=1) == times[:5].tolist()


def test_both_ways_are_sent_in_turn_and_the_limit_is_taken_off(service, asked):
    test = load_test(
        service,
        asked,
        callers=(1, 3),
        requests=3,
        busy_percents=(80,),
        rounds=1,
        precision=None,
        progress=False,
    )
    frame = test.frame()
    assert frame["load"].tolist() == [*["1 caller"] * 2, *["3 callers"] * 2, *["busy to 80 %"] * 2]
    assert frame["way"].tolist() == [ALONE, BATCHES] * 3
    assert (frame["completed"] == 6).all()
    alone, batches = (frame[frame["way"] == way].set_index("load")["mean_batch"] for way in (ALONE, BATCHES))
    assert (alone == 1).all()
    assert batches["1 caller"] == 1
    assert batches["3 callers"] > 1
    assert len(test.requests()) == 36
    assert len(set(test.requests()["round"])) == 2
    answer = load_answer(test, None, 3)
    assert "3 callers at a time" in answer.headline or "one caller" in answer.headline
    assert max(reply.mean_batch for reply in send(service, bodies(3), at_once=3)) > 1


def test_a_service_elsewhere_is_read_and_measured_as_it_is(service, asked):
    elsewhere = remote(service.url, service.token)
    assert elsewhere.facts == service.facts
    assert elsewhere.limit is None
    test = load_test(elsewhere, asked, callers=(2,), requests=2, rounds=1, precision=None, progress=False)
    assert test.frame()["way"].tolist() == [BATCHES]
    assert load_answer(test, None, 2).headline.startswith("The service makes")
    with pytest.raises(WanlabError, match="refuses: give the token"):
        remote(service.url, "wrong")
    with pytest.raises(
        WanlabError, match=r"no service answers at http://127\.0\.0\.1:9: .*; start one with wanlab serve"
    ):
        remote("http://127.0.0.1:9")


@pytest.mark.parametrize(
    "given", [{"at_once": 0}, {"at_once": 1, "sent_s": [0.0]}, {}, {"sent_s": [0.0, 1.0]}], ids=str
)
def test_a_load_is_one_of_the_two(given):
    with pytest.raises(WanlabError):
        send(Served("http://127.0.0.1:9", "", None), bodies(1), **given)


def test_an_unreachable_service_is_one_line():
    with pytest.raises(WanlabError, match="the load ended early"):
        send(Served("http://127.0.0.1:9", "", None), bodies(1), at_once=1)


def test_figures_of_replies_that_are_known():
    def reply(sent, latency, status="completed"):
        return Reply(sent_ms=sent, latency_ms=latency, status=status, mean_batch=2.0, queue_wait_ms=10.0)

    replies = [reply(0, 1000), reply(0, 3000), reply(1000, 1000, "failed"), reply(2000, 5, "refused")]
    load = Load("2 callers", 2, None, {BATCHES: [replies]}, {BATCHES: [3000.0]}, None)
    (row,) = LoadTest((load,), 4, 2.0, "").frame().to_dict("records")
    assert (row["completed"], row["refused"], row["failed"]) == (2, 1, 1)
    assert row["videos_per_min"] == pytest.approx(40)
    assert row["in_time_per_min"] == pytest.approx(20)
    assert (row["latency_p50_s"], row["latency_max_s"], row["latency_p99_s"]) == (2.0, 3.0, None)


def test_a_body_has_the_picture_in_whole_levels(service, asked):
    body = body_of(asked[0], service.facts)
    assert body["size"] == "64x64"
    assert body["input_reference"].startswith("data:image/png;base64,")
    levels = {**asked[0], "image": np.zeros((8, 8, 3), np.uint8)}
    assert body_of(levels, service.facts)["input_reference"] != body["input_reference"]
