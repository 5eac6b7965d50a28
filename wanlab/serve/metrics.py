"""Counters of a service for Prometheus."""

from __future__ import annotations

from typing import Any

from wanlab.core.errors import require

LATENCIES_S = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600)
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 32)


class Metrics:
    """The metrics of one service, in a registry of their own."""

    def __init__(self) -> None:
        client = require("prometheus_client", "'wanlab[serve]'")
        self._client, self.registry = client, client.CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "wanlab"}
        self.accepted = client.Counter("requests_accepted", "requests that were accepted", **own)
        self.refused = client.Counter(
            "requests_refused", "requests that were not accepted", ["reason"], **own
        )
        self.ended = client.Counter("jobs_ended", "jobs by how they ended", ["status"], **own)
        self.waiting = client.Gauge("queue_length", "requests that wait", **own)
        self.running = client.Gauge("jobs_running", "videos that are being made", **own)
        self.latency = client.Histogram(
            "latency_seconds", "from acceptance to the video", buckets=LATENCIES_S, **own
        )
        self.wait = client.Histogram(
            "queue_wait_seconds", "from acceptance to the start", buckets=LATENCIES_S, **own
        )
        self.batch = client.Histogram(
            "batch_size", "mean samples of the denoiser's calls of a video", buckets=BATCHES, **own
        )
        self.stage = client.Counter("stage_seconds", "time of finished videos by stage", ["stage"], **own)
        self.peak = client.Gauge("peak_memory_bytes", "largest memory of the GPU that PyTorch held", **own)

    def done(self, result: dict[str, Any], latency_s: float, wait_s: float) -> None:
        """Count a finished video."""
        self.latency.observe(latency_s)
        self.wait.observe(wait_s)
        self.batch.observe(result["mean_batch"])
        for stage in ("encode", "denoise", "decode", "wait"):
            self.stage.labels(stage).inc(result[f"{stage}_ms"] / 1e3)
        if result["peak_memory_mib"]:
            self.peak.set(result["peak_memory_mib"] * 2**20)

    def text(self) -> tuple[bytes, str]:
        """All metrics in Prometheus' text format, and its content type."""
        return self._client.generate_latest(self.registry), self._client.CONTENT_TYPE_LATEST
