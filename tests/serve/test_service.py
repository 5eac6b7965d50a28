"""A service in this process, over HTTP: from a request to its video, the queue, cancellation, keys and restarts."""

import io
import json
import threading
import time

import av
import numpy as np
import pytest
from PIL import Image
from support.services import MODEL, SIZE, SLOW, Client, data_url, picture, settings

from wanlab import models
from wanlab.core.errors import WanlabError
from wanlab.serve.running import served
from wanlab.serve.worker import frames_digest


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with served(settings(tmp_path_factory.mktemp("service")), ray=False) as running:
        yield running


@pytest.fixture
def client(service):
    with Client(service.url) as client:
        yield client


@pytest.fixture(scope="module")
def model():
    return models.load(MODEL, device="cpu", weights="random")


def generated(model, seed, **more):
    width, height, frames = SIZE
    image = Image.open(io.BytesIO(picture(seed)))
    return model.generate(image, "a cat", seed=seed, width=width, height=height, frames=frames, **more).video


def decoded(content):
    with av.open(io.BytesIO(content)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def test_a_video_alone_is_bit_for_bit_what_the_model_generates(client, model):
    told = client.until(client.accepted(seed=3, output_format="mkv"))
    assert (told["status"], told["progress"], told["step"]) == ("completed", 100, 2)
    expected = generated(model, 3)
    assert told["result"]["frames_sha256"] == frames_digest(expected)
    assert told["result"]["largest_batch"] == 1
    file = client.get(f"/v1/videos/{told['id']}/content")
    assert file.headers["content-type"] == "video/x-matroska"
    assert np.array_equal(decoded(file.content), np.round(expected * 255).astype(np.uint8))
    assert file.headers["x-wanlab-configuration"] == told["versions"]["configuration_hash"]


def test_a_form_with_a_file_gives_the_same_video_as_json(client):
    fields = {"prompt": "a cat", "seed": "5", "size": "64x64", "num_inference_steps": "2"}
    form = client.post("/v1/videos", data=fields, files={"input_reference": ("cat.png", picture(5))})
    told = [client.until(form.json()["id"]), client.until(client.accepted(seed=5))]
    assert told[0]["result"]["frames_sha256"] == told[1]["result"]["frames_sha256"]
    content = client.get(f"/v1/videos/{told[0]['id']}/content").content
    assert decoded(content).shape == (9, 64, 64, 3)


def test_videos_of_a_batch_are_their_own_within_one_level_of_255(client, model):
    told = [client.accepted(seed=seed, output_format="mkv", num_inference_steps=40) for seed in range(3)]
    told = [client.until(identity) for identity in told]
    assert max(each["result"]["largest_batch"] for each in told) > 1
    for seed, each in enumerate(told):
        video = decoded(client.get(f"/v1/videos/{each['id']}/content").content).astype(int)
        assert np.abs(video - np.round(generated(model, seed, steps=40) * 255)).max() <= 1


def test_progress_is_told_as_events_until_the_end(client):
    identity = client.accepted(**SLOW)  # a video of some seconds: a short one may end between two looks at it
    with client.stream("GET", f"/v1/videos/{identity}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    steps = [each["step"] for each in told]
    assert steps == sorted(steps)
    assert len(set(steps)) > 3
    assert (told[-1]["status"], told[-1]["step"]) == ("completed", SLOW["num_inference_steps"])


def test_a_running_video_is_cancelled_within_a_step(client):
    identity = client.accepted(**SLOW)
    client.until(identity, "in_progress")
    begin = time.monotonic()
    assert client.delete(f"/v1/videos/{identity}").json()["status"] == "cancelled"
    assert client.until(identity)["error"]["code"] == "cancelled"
    assert client.get(f"/v1/videos/{identity}/content").status_code == 409
    after = client.until(client.accepted())  # its place is free again
    assert (after["status"], after["result"]["largest_batch"]) == ("completed", 1)
    assert time.monotonic() - begin < 4  # the whole video takes longer
    client.delete(f"/v1/videos/{identity}")
    assert client.get(f"/v1/videos/{identity}").status_code == 404


def test_one_answer_for_one_key(client):
    first = client.submit(seed=7, key="once")
    again = client.submit(seed=7, key="once")
    assert first.json()["id"] == again.json()["id"]
    assert again.headers["idempotent-replay"] == "true"
    other = client.submit(seed=8, key="once")
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")


def test_a_key_given_many_times_at_once_makes_one_video(client):
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.submit(key="many").json()["id"]))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert len(set(answers)) == 1


def test_a_deadline_ends_a_video(client):
    told = client.until(client.accepted(**SLOW, deadline_s=0.5))
    assert (told["status"], told["error"]["code"]) == ("failed", "deadline")


def test_only_who_has_the_token_is_let_in(service):
    for path in ("/v1/videos", "/v1/models", "/metrics", "/v1/videos/x", "/v1/videos/x/content"):
        for token in ("", "t0ke", "t0ken2", "T0KEN"):
            with Client(service.url, token or "-") as stranger:
                assert stranger.get(path).status_code == 401, path
    with Client(service.url, "-") as stranger:
        assert stranger.submit().status_code == 401
        assert stranger.delete("/v1/videos/x").status_code == 401
        assert stranger.get("/healthz").json() == {"status": "ready"}


def test_the_model_and_the_counters_are_told(client):
    client.until(client.accepted())
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == MODEL
    assert model["sizes"] == [{"size": "64x64", "num_frames": 9}, {"size": "192x192", "num_frames": 17}]
    assert {"wanlab", "torch", "configuration_hash"} <= set(model["versions"])
    text = client.get("/metrics").text
    assert 'wanlab_jobs_ended_total{status="completed"}' in text
    assert "wanlab_queue_length 0.0" in text


def test_a_full_queue_says_when_to_ask_again(tmp_path):
    with (
        served(settings(tmp_path, max_batch=1, queue=2, warm_up=False), ray=False) as running,
        Client(running.url) as client,
    ):
        first = client.accepted(**SLOW)
        client.until(first, "in_progress")
        waiting = [client.accepted(seed=seed) for seed in (1, 2)]
        assert [client.video(each)["queue_position"] for each in waiting] == [0, 1]
        refused = client.submit(seed=3)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert client.delete(f"/v1/videos/{waiting[0]}").json()["status"] == "cancelled"  # it waited
        waiting.append(client.accepted(seed=3))  # and has left its place
        client.delete(f"/v1/videos/{first}")
        assert [client.until(each)["status"] for each in waiting] == ["cancelled", "completed", "completed"]


def test_what_waited_is_made_after_a_restart_and_nothing_twice(tmp_path):
    own = settings(tmp_path, max_batch=1, warm_up=False)
    with served(own, ray=False) as running, Client(running.url) as client:
        done = client.until(client.accepted(seed=9))
        asked = [client.accepted(seed=0, **SLOW)]
        client.until(asked[0], "in_progress")
        asked += [client.accepted(seed=seed, key=f"key {seed}") for seed in (1, 2)]
    (tmp_path / "video_000000000000000000000000.png").write_bytes(b"of no job")
    with served(own, ray=False) as running, Client(running.url) as client:
        assert client.submit(seed=1, key="key 1").json()["id"] == asked[1]
        told = [client.until(identity) for identity in asked]
        assert [(each["status"], each["error"]) for each in told] == [("completed", None)] * 3
        assert client.video(done["id"])["result"] == done["result"]
        assert len(client.get("/v1/videos").json()["data"]) == 4
    assert {path.suffix for path in tmp_path.iterdir()} == {".mp4", ".sqlite", ".lock"}


def test_a_second_service_does_not_take_the_folder(service, tmp_path):
    own = settings(tmp_path, warm_up=False)
    with served(own, ray=False), pytest.raises(WanlabError, match="another service"), served(own, ray=False):
        pass


def test_results_go_when_their_time_is_over_and_the_oldest_when_room_is_short(tmp_path):
    own = settings(tmp_path, warm_up=False, keep_gib=1e-5)  # 10 KiB
    with served(own, ray=False) as running, Client(running.url) as client:
        told = [client.until(client.accepted(seed=seed, output_format="mkv")) for seed in range(2)]
        end = time.monotonic() + 10
        while client.get(f"/v1/videos/{told[0]['id']}/content").status_code != 410:
            assert time.monotonic() < end
            time.sleep(0.1)
    with served(settings(tmp_path, warm_up=False, keep_s=0.2), ray=False) as running:  # noqa: SIM117
        with Client(running.url) as client:
            identity = client.until(client.accepted())["id"]
            end = time.monotonic() + 10
            while client.get(f"/v1/videos/{identity}").status_code != 404:
                assert time.monotonic() < end
                time.sleep(0.1)


def test_a_wrong_model_or_a_taken_port_is_one_line(service, tmp_path):
    with (
        pytest.raises(WanlabError, match="nonsense"),
        served(settings(tmp_path, model="nonsense"), ray=False),
    ):
        pass
    port = int(service.url.rpartition(":")[2])
    with (
        pytest.raises(WanlabError, match="cannot be listened on"),
        served(settings(tmp_path), port=port, ray=False),
    ):
        pass


def test_a_request_to_an_address_is_not_fetched(client):
    for address in ("http://127.0.0.1/x.png", "https://a.b/c.png", "file:///etc/passwd"):
        answer = client.submit(input_reference=address)
        assert (answer.status_code, "does not fetch" in answer.text) == (400, True)
    assert client.submit(input_reference={"image_url": data_url(picture())}).status_code == 200
