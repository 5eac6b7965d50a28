"""Benchmark of any engine, with the figures that trtexec prints."""

from wanlab.measure.benchmark.result import Bench, bench_table, read_bench
from wanlab.measure.benchmark.run import bench, events_check

__all__ = ["Bench", "bench", "bench_table", "events_check", "read_bench"]
