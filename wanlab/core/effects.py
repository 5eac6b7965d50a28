"""Whether a configuration was applied: the values of `effect` in results, tables and pages."""

APPLIED = "applied"
"""The effect check saw it in weights, operators, nodes or graphs."""

NOT_APPLIED = "not applied"
"""The effect check did not see it: times and quality are those of another configuration."""

BASELINE = "baseline"
"""The configuration changes nothing: the model as it was loaded, in eager PyTorch."""
