"""Verdicts on the paper's claims: computed from what was measured, by a rule that stands beside each."""

REPRODUCED, IN_PART, NOT = "reproduced", "reproduced in part", "not reproduced"


def claim(paper: str, measured: str, *holds: bool) -> dict[str, str]:
    """A claim and what was measured; it is reproduced if every part holds, and in part if some do."""
    verdict = REPRODUCED if all(holds) else IN_PART if any(holds) else NOT
    return {"paper": _sentence(paper), "measured": _sentence(measured), "verdict": verdict}


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].removesuffix(".") + "."


def share(value: float) -> str:
    """A proportion as text."""
    return f"{100 * value:.1f}%"
