"""What several tests build on: tiny models, traces, engines and runs."""
