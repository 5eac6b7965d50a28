"""One video against another: PSNR, SSIM, LPIPS, and what they mean for quality.

>>> from wanlab import evaluate
>>> scores = evaluate.compare_videos("original.mp4", "optimized.mp4")
>>> scores.summary
"""

from __future__ import annotations

from wanlab.evaluate.lpips import BACKBONES, Backbone, available_backbones
from wanlab.evaluate.metrics import compare_videos
from wanlab.evaluate.quality import Divergence, QualityLoss, divergence, quality_loss
from wanlab.evaluate.scores import METRICS, Scores
from wanlab.evaluate.video import Video, read_video, write_video
from wanlab.evaluate.worst import worst_frames

__all__ = [
    "BACKBONES",
    "METRICS",
    "Backbone",
    "Divergence",
    "QualityLoss",
    "Scores",
    "Video",
    "available_backbones",
    "compare_videos",
    "divergence",
    "quality_loss",
    "read_video",
    "worst_frames",
    "write_video",
]
