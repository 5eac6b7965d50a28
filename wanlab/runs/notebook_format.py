"""`nbformat`, imported without a grammar of internet addresses that takes two seconds to build.

jsonschema, on which it stands, imports `rfc3987_syntax` wherever that is installed, and JupyterLab installs it. It checks
strings whose schema says `format: iri`; the schema of notebooks has none. Every run would pay for it twice: in the process
that supervises and in the kernel.
"""

from __future__ import annotations

import sys

GRAMMAR = "rfc3987_syntax"

_hidden = GRAMMAR not in sys.modules
if _hidden:
    sys.modules[GRAMMAR] = None  # an import of it fails, which jsonschema expects
try:
    import nbformat as nbformat
finally:
    if _hidden:
        del sys.modules[GRAMMAR]
