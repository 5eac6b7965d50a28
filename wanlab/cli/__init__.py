"""The `wanlab` command: one module a subcommand, imported only when it is asked for."""

from wanlab.cli.main import main

__all__ = ["main"]
