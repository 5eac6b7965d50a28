"""An engine and a plan together: one configuration of a model, proven and measured alone."""
