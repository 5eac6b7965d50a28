"""Loop schedules for the CPU. TVM's wheel has neither a BLAS nor a rule for matrix products on the CPU, and its plain
loop nest of one runs at about 2 % of the processor's arithmetic.

The matrix product here is register-tiled (Goto and van de Geijn, "Anatomy of High-Performance Matrix
Multiplication", 2008, without the packing): 6 rows by 4 vectors of accumulators where there are 32 vector registers,
6 by 2 where there are 16; the inner loop runs over the reduction.
"""

from __future__ import annotations

import math

ROWS = 6
PARALLEL_ABOVE = 16_384  # elements; below, starting the threads costs more than the loop
CHUNKS = 32  # parallel pieces that are enough for any number of threads here


def rules() -> list:
    """dlight schedule rules, to be tried in order on every function of a module."""
    from tvm.s_tir import dlight

    return [_rule("Matmul", _matmul), _guarded(dlight.cpu.Reduction()), _rule("Elementwise", _elementwise)]


def _rule(name: str, schedule):
    """A dlight rule of a function; what cannot be scheduled stays as it is."""
    from tvm.s_tir.dlight.base import ScheduleRule

    @ScheduleRule.from_callable(name)
    def rule(function, target, _tunable):
        from tvm.s_tir.schedule import ScheduleError

        try:
            return schedule(function, target)
        except ScheduleError:
            return None

    return rule


def _guarded(rule):
    def schedule(function, target):
        # On a convolution it is slower than no schedule at all.
        if any("conv" in info.name for info in _blocks(function)[1]):
            return None
        return rule.apply(function, target, False)

    return _rule(type(rule).__name__, schedule)


def _blocks(function):
    from tvm import s_tir, tirx
    from tvm.s_tir.dlight.analysis import normalize_prim_func

    if not isinstance(function, tirx.PrimFunc):
        return None, ()
    schedule = s_tir.Schedule(function)
    return schedule, normalize_prim_func(schedule) or ()


def _matmul(function, target):
    """Tile, unroll and vectorise a matrix product, with what follows it per element inside the tile."""
    schedule, blocks = _blocks(function)
    products = [i for i, info in enumerate(blocks) if not info.is_injective()]
    if len(products) != 1 or "matmul" not in blocks[products[0]].name:
        return None
    at = products[0]
    sizes = [iteration.dom for iteration in blocks[at].iters]
    if not all(isinstance(size, int) for size in sizes) or not blocks[at].dom_kind().endswith("SSR"):
        return None
    block = blocks[at].block_rv
    if (after := _inline(schedule, blocks, at)) is None:
        after = schedule.cache_write(block, 0, "global")

    *batch, row, column, depth = schedule.get_loops(block)
    lanes, most = _registers(target)
    vector = _largest_divisor(sizes[-2], lanes)
    vectors = _largest_divisor(sizes[-2] // vector, most)
    rows, row_in = schedule.split(row, [None, _largest_divisor(sizes[-3], ROWS)])
    columns, column_in, lane = schedule.split(column, [None, vectors, vector])
    schedule.reorder(*batch, rows, columns, depth, row_in, column_in, lane)
    schedule.reverse_compute_at(after, columns)
    _vectorise_innermost(schedule, after, vector)
    schedule.parallel(schedule.fuse(*batch, rows, columns))
    schedule.vectorize(lane)
    schedule.unroll(row_in)
    schedule.unroll(column_in)
    start = schedule.decompose_reduction(block, depth)
    row_in, column_in, lane = schedule.get_loops(start)[-3:]
    schedule.vectorize(lane)
    schedule.unroll(row_in)
    schedule.unroll(column_in)
    return schedule


def _inline(schedule, blocks, at: int):
    """Fold every block but the product and the last one away; gives the last one, if there is one."""
    for info in blocks[:at]:
        schedule.compute_inline(info.block_rv)
    *between, last = [info.block_rv for info in blocks[at:]]
    for other in between[1:]:
        schedule.compute_inline(other)
    return last if between else None


def _vectorise_innermost(schedule, block, vector: int) -> None:
    _, lane = schedule.split(schedule.get_loops(block)[-1], [None, vector])
    schedule.vectorize(lane)


def _elementwise(function, _target):
    """Share the outer loops among the threads; LLVM vectorises the inner ones itself."""
    schedule, blocks = _blocks(function)
    if len(blocks) != 1 or not blocks[0].is_injective():
        return None
    sizes = [iteration.dom for iteration in blocks[0].iters]
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return None
    if math.prod(sizes) < PARALLEL_ABOVE:
        return None
    outer, count = 1, 0
    while outer < CHUNKS and count < len(sizes) - 1:
        outer *= sizes[count]
        count += 1
    loops = schedule.get_loops(blocks[0].block_rv)
    if not count or len(loops) != len(sizes):
        return None
    schedule.parallel(schedule.fuse(*loops[:count]))
    return schedule


def _registers(target) -> tuple[int, int]:
    """float32 lanes of a vector register, and how many of them a row of the tile may take."""
    from tvm.target import codegen

    features = {str(feature) for feature in codegen.llvm_get_cpu_features(target)}
    return (16, 4) if "avx512f" in features else (8, 2) if "avx" in features else (4, 2)


def _largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)
