"""The table of fuzzing, from the JSON that `make fuzz` writes."""

from __future__ import annotations

from table_text import machine, markdown, read


def fuzzing() -> str:
    """What the mutated inputs of each parser came to."""
    record = read("fuzzing_cpu")
    rows = [
        [
            name,
            *(f"{row[key]:,}" for key in ("inputs", "read", "refused", "failed")),
            f"{1e3 * row['slowest_s']:,.0f}",
            f"{row['peak_mib']:,}" if row["peak_mib"] else "under 1",
        ]
        for name, row in record["parsers"].items()
    ]
    total = sum(row["inputs"] for row in record["parsers"].values())
    header = ["parser", "inputs", "read", "refused in one line", "failed", "slowest, ms", "most memory, MiB"]
    note = (
        f"\n\n{machine(record['environment'])}; {total:,} inputs in {record['seconds'] / 60:.0f} minutes."
        " Memory is what one input added to the process at its peak."
    )
    return markdown(header, rows) + note


TABLES = {"fuzzing": fuzzing}
