"""What the top of a report must be: read within seconds on a phone by a colleague who has never seen wanlab."""

from __future__ import annotations

import re

from wanlab.core.answer import Answer

JARGON = re.compile(
    r"\w+_\w+|\d[eE][-+]?\d|\b(A/A|tier|uniform|churn|floor|as asked|nan|inf)\b|\.(json|yaml|onnx|py)\b"
)


def faults(answer: Answer) -> list[str]:
    """What is wrong with an answer, one line each."""
    found = [f"{len(answer.headline)} characters"] if len(answer.headline) > 240 else []
    found += [f"the headline says {match.group()}" for match in JARGON.finditer(answer.headline)]
    found += [f"{len(answer.details)} details"] if len(answer.details) > 3 else []
    found += [] if answer.next and answer.next.why else ["nothing to do next"]
    found += [f"{len(answer.tiles)} tiles"] if not 3 <= len(answer.tiles) <= 5 else []
    found += [
        f"{tile.title}: {tile.value}" for tile in answer.tiles if re.search(r"nan|\de[-+]\d", tile.value)
    ]
    found += [] if re.match(r"[A-Z0-9]", answer.headline) else ["the headline begins with a small letter"]
    sentences = [answer.headline, *answer.details]
    return found + [f"no sentence: {text!r}" for text in sentences if not text.endswith(".")]
