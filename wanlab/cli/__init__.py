"""The `wanlab` command: one module a command, imported only when it is asked for; `main.py` has the table."""
