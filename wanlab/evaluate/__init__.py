"""One video against another: scores of frames and of motion, and what they mean for quality.

>>> from wanlab import evaluate
>>> scores = evaluate.compare_videos("original.mp4", "optimized.mp4")
>>> scores.summary
"""

from __future__ import annotations

from wanlab.evaluate.catalogue import ALL_METRICS, CATALOGUE, METRICS, TEMPORAL, Metric
from wanlab.evaluate.floor import Floors, floor_table, floors
from wanlab.evaluate.heat import DifferenceClip, HeatMap, difference_clip, heat_maps
from wanlab.evaluate.lpips import BACKBONES, Backbone, available_backbones
from wanlab.evaluate.metrics import compare_videos
from wanlab.evaluate.quality import Divergence, QualityLoss, divergence, loss_to_truth, quality_loss
from wanlab.evaluate.scores import Scores
from wanlab.evaluate.tiers import TIERS, Tier, TierRule, tier
from wanlab.evaluate.video import Video, read_pair, read_video, write_video
from wanlab.evaluate.worst import worst_frames

__all__ = [
    "ALL_METRICS",
    "BACKBONES",
    "CATALOGUE",
    "METRICS",
    "TEMPORAL",
    "TIERS",
    "Backbone",
    "DifferenceClip",
    "Divergence",
    "Floors",
    "HeatMap",
    "Metric",
    "QualityLoss",
    "Scores",
    "Tier",
    "TierRule",
    "Video",
    "available_backbones",
    "compare_videos",
    "difference_clip",
    "divergence",
    "floor_table",
    "floors",
    "heat_maps",
    "loss_to_truth",
    "quality_loss",
    "read_pair",
    "read_video",
    "tier",
    "worst_frames",
    "write_video",
]
