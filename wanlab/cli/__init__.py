"""The `wanlab` command: the table of commands is in `main.py`, and a module is imported only when its command runs."""
