"""Comparison of two videos: scores of frames and of motion, and their meaning for quality.

>>> from wanlab import evaluate
>>> scores = evaluate.compare_videos("original.mp4", "optimized.mp4")
>>> scores.summary
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
