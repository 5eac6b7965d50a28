"""Timing, memory, stages and environment: numbers with all their samples and where they were taken.

>>> from wanlab import measure
>>> samples = measure.time_ms(lambda: model(x), iterations=20)
>>> with measure.stages(model) as recorder:
...     generation = model.generate(image, prompt)
>>> recorder.breakdown(generation.wall_ms)
"""

from __future__ import annotations

from wanlab.measure.baseline import Baseline, baseline, before_after
from wanlab.measure.benchmark import Bench, bench, bench_table, events_check, read_bench
from wanlab.measure.ceilings import Ceilings, ceilings, recorded_ceilings
from wanlab.measure.environment import environment
from wanlab.measure.memory import PeakMemory, peak_memory
from wanlab.measure.platform_files import RESULTS, read_platform, read_platforms
from wanlab.measure.platform_records import PlatformRecord, Work, forward_records
from wanlab.measure.platforms import comparable, platform_table, platform_verdict
from wanlab.measure.samples import CV_LIMIT_PERCENT, AAControl, Comparison, Samples, compare
from wanlab.measure.side_by_side import SideBySide, side_by_side
from wanlab.measure.stages import COMPONENTS, OTHER, StageCall, StageRecorder, stages
from wanlab.measure.timing import aa_control, in_turn, time_ms

__all__ = [
    "COMPONENTS",
    "CV_LIMIT_PERCENT",
    "OTHER",
    "RESULTS",
    "AAControl",
    "Baseline",
    "Bench",
    "Ceilings",
    "Comparison",
    "PeakMemory",
    "PlatformRecord",
    "Samples",
    "SideBySide",
    "StageCall",
    "StageRecorder",
    "Work",
    "aa_control",
    "baseline",
    "before_after",
    "bench",
    "bench_table",
    "ceilings",
    "comparable",
    "compare",
    "environment",
    "events_check",
    "forward_records",
    "in_turn",
    "peak_memory",
    "platform_table",
    "platform_verdict",
    "read_bench",
    "read_platform",
    "read_platforms",
    "recorded_ceilings",
    "side_by_side",
    "stages",
    "time_ms",
]
