"""`python -m wanlab.cli`: the `wanlab` command."""

import sys

from wanlab.cli.main import main

sys.exit(main())
