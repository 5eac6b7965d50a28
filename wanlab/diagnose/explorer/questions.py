"""Five questions about a trace, each a query in SQL over `events`, `work` and `stretches` with a documented result."""

from __future__ import annotations

from dataclasses import dataclass

PART = r"regexp_replace(regexp_replace(module, '^expert_(high|low)', 'expert'), '\.\d+', '.*', 'g')"
"""SQL: path of a module with * for numbers of layers, the same for both experts."""
BUSY = "kind NOT IN ('user_annotation', 'python_function')"


@dataclass(frozen=True)
class Question:
    """A named query.

    Attributes:
        title: the question, in words.
        result: what its columns are.
        sql: the query.
    """

    title: str
    result: str
    sql: str


QUESTIONS = {
    "longest_gaps": Question(
        "Where is nothing running for the longest?",
        "start_us, gap_us (no work on any lane), waits_for (category of the wall clock in it), component, step, after and"
        " before (names of the work around it); longest first.",
        f"""
        WITH ordered AS (
            SELECT *, max(start_us + time_us) OVER before_it AS reached, lag(name) OVER (ORDER BY start_us) AS after
            FROM work WHERE {BUSY}
            WINDOW before_it AS (ORDER BY start_us ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
        ), gaps AS (
            SELECT reached AS start_us, start_us - reached AS gap_us, after, name AS before FROM ordered
            WHERE start_us > reached ORDER BY gap_us DESC LIMIT 12
        )
        SELECT gaps.start_us, gap_us, category AS waits_for, component, step, after, before
        FROM gaps ASOF LEFT JOIN stretches ON gaps.start_us >= stretches.start_us ORDER BY gap_us DESC
        """,
    ),
    "largest_copies": Question(
        "Which copies move the most?",
        "name, copies, moved_bytes (of all of them), time_ms, gb_per_s, component, module, shapes; most bytes first. On a"
        " CPU copies are the operators that copy a tensor, whose time includes a conversion.",
        """
        SELECT name, count(*) AS copies, sum(moved_bytes) AS moved_bytes, sum(own_us) / 1e3 AS time_ms,
            sum(moved_bytes) / nullif(sum(own_us), 0) / 1e3 AS gb_per_s, component, module, shapes
        FROM work WHERE (kind = 'gpu_memcpy' OR name IN ('aten::copy_', 'aten::_to_copy', 'aten::clone', 'aten::cat'))
        GROUP BY ALL HAVING sum(moved_bytes) > 0 ORDER BY moved_bytes DESC LIMIT 12
        """,
    ),
    "far_from_roofline": Question(
        "Which kernels lose the most time to their roofline?",
        "name, shapes, category, calls, time_ms, roofline_ms (least time for the same operations and bytes), lost_ms (the"
        " difference), of_roofline_percent, tflop_per_s, gb_per_s; largest loss first. Work without known shapes or"
        " ceilings is left out.",
        """
        SELECT name, shapes, category, count(*) AS calls, sum(own_us) / 1e3 AS time_ms,
            sum(roofline_us) / 1e3 AS roofline_ms, sum(own_us - roofline_us) / 1e3 AS lost_ms,
            100 * sum(roofline_us) / nullif(sum(own_us), 0) AS of_roofline_percent,
            nullif(sum(flop), 0) / nullif(sum(own_us), 0) / 1e6 AS tflop_per_s,
            nullif(sum(moved_bytes), 0) / nullif(sum(own_us), 0) / 1e3 AS gb_per_s
        FROM work WHERE roofline_us > 0 AND isfinite(roofline_us)
        GROUP BY ALL ORDER BY lost_ms DESC LIMIT 12
        """,
    ),
    "steps_differ": Question(
        "What differs between the quickest and the slowest step?",
        "part (module, the same name for both experts and all layers), category, quick_step, slow_step, quick_ms, slow_ms,"
        " change_ms; largest change first. Only experts are compared: the first and last step also encode and decode.",
        f"""
        WITH parts AS (
            SELECT step, {PART} AS part, category, sum(own_us) / 1e3 AS time_ms FROM work
            WHERE step >= 0 AND component IN ('expert', 'expert_high', 'expert_low') GROUP BY ALL
        ), steps AS (SELECT step, sum(time_ms) AS time_ms FROM parts GROUP BY step),
        ends AS (SELECT arg_min(step, time_ms) AS quick_step, arg_max(step, time_ms) AS slow_step FROM steps)
        SELECT part, category, quick_step, slow_step,
            coalesce(sum(time_ms) FILTER (step = quick_step), 0) AS quick_ms,
            coalesce(sum(time_ms) FILTER (step = slow_step), 0) AS slow_ms, slow_ms - quick_ms AS change_ms
        FROM parts, ends WHERE quick_step <> slow_step GROUP BY ALL ORDER BY abs(change_ms) DESC LIMIT 12
        """,
    ),
    "not_fused": Question(
        "What did the compiler not fuse?",
        "part (module at the beginning of a chain), chains, kernels (of one chain, on average), time_ms, moved_gb,"
        " saves_ms (time_ms without the least time of each chain's largest member: a fused kernel cannot save more); most"
        " saved first. A chain is two or more pointwise kernels one after another, those of Inductor left out.",
        f"""
        WITH ordered AS (
            SELECT *, row_number() OVER (PARTITION BY lane ORDER BY start_us) AS place, {PART} AS part,
                operation = 'pointwise' AND {BUSY} AND kind <> 'gpu_memset' AND name NOT LIKE 'triton_%' AS loose
            FROM work WHERE kind NOT IN ('gpu_memcpy', 'cuda_runtime', 'cuda_driver', 'user_annotation')
        ), numbered AS (
            SELECT *, place - row_number() OVER (PARTITION BY lane, loose ORDER BY start_us) AS chain FROM ordered
        ), chains AS (
            SELECT arg_min(part, start_us) AS part, count(*) AS kernels, sum(own_us) AS own_us,
                sum(moved_bytes) AS moved_bytes, max(coalesce(nullif(roofline_us, 'nan'), 0)) AS least_us
            FROM numbered WHERE loose GROUP BY lane, component, chain HAVING count(*) > 1
        )
        SELECT part, count(*) AS chains, avg(kernels) AS kernels, sum(own_us) / 1e3 AS time_ms,
            sum(moved_bytes) / 1e9 AS moved_gb, sum(greatest(own_us - least_us, 0)) / 1e3 AS saves_ms
        FROM chains GROUP BY part ORDER BY saves_ms DESC LIMIT 12
        """,
    ),
}
"""Name -> question."""
