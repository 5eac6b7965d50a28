"""A client of a video service, pictures to send, and settings of a service that is small and starts soon."""

from __future__ import annotations

import base64
import io
import time
from typing import Any

import httpx
import numpy as np
from PIL import Image

from wanlab.serve.settings import ServiceSettings

SIZE = (64, 64, 9)
SLOW = {"size": "192x192", "num_frames": 17, "num_inference_steps": 100}
"""Fields of a request whose video takes some seconds."""
MODEL = "tiny-wan2.2-i2v"


def settings(folder: Any, **changes: Any) -> ServiceSettings:
    """Settings of a service with a tiny model of random weights on the CPU."""
    tiny = {
        "model": MODEL,
        "weights": "random",
        "device": "cpu",
        "sizes": (SIZE, (192, 192, 17)),
        "threads": 1,
    }
    return ServiceSettings(**{**tiny, "folder": str(folder), "max_batch": 4, "token": "t0ken", **changes})


def picture(seed: int = 0, width: int = 64, height: int = 64, kind: str = "PNG") -> bytes:
    """A picture of noise as the bytes of a file."""
    packed = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(packed, kind)
    return packed.getvalue()


def data_url(content: bytes) -> str:
    """A picture as a data URL."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


class Client(httpx.Client):
    """HTTP to a service with its token."""

    def __init__(self, url: str, token: str = "t0ken") -> None:
        super().__init__(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60)

    def submit(
        self, prompt: str = "a cat", *, seed: int = 0, key: str | None = None, **fields: Any
    ) -> httpx.Response:
        """Ask for a video of the picture of a seed, as JSON."""
        body = {"prompt": prompt, "seed": seed, "input_reference": data_url(picture(seed)), **fields}
        return self.post("/v1/videos", json=body, headers={"Idempotency-Key": key} if key else {})

    def accepted(self, prompt: str = "a cat", **fields: Any) -> str:
        """Id of a video that was asked for and accepted."""
        answer = self.submit(prompt, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def video(self, identity: str) -> dict[str, Any]:
        """What is told of a video."""
        return self.get(f"/v1/videos/{identity}").json()

    def until(self, identity: str, *statuses: str, seconds: float = 90) -> dict[str, Any]:
        """What is told of a video as soon as it has one of the statuses, by default any that ends it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            told = self.video(identity)
            if told["status"] in (statuses or ("completed", "failed", "cancelled")):
                return told
            time.sleep(0.02)
        raise AssertionError(f"{identity} is still {told['status']} after {seconds} s")
