"""The paper's claims: what it says, what was measured, and the named conditions that decide the verdict."""

import dataclasses
from collections.abc import Mapping

REPRODUCED, IN_PART, NOT = "reproduced", "reproduced in part", "not reproduced"
VERDICTS = (REPRODUCED, IN_PART, NOT)


@dataclasses.dataclass(frozen=True)
class Claim:
    """Reproduced if every condition holds, in part if some do. Texts are sentences without their full stop."""

    paper: str
    measured: str
    conditions: Mapping[str, bool]  # what has to hold -> whether it holds

    def __post_init__(self):
        if not self.conditions:
            raise ValueError(f"a claim without conditions: {self.paper}")

    @property
    def verdict(self) -> str:
        holds = self.conditions.values()
        return REPRODUCED if all(holds) else IN_PART if any(holds) else NOT

    @property
    def failed(self) -> list[str]:
        """The conditions that do not hold."""
        return [name for name, holds in self.conditions.items() if not holds]

    def __str__(self) -> str:
        lines = [f"{self.verdict}: {self.paper}.", f"    {self.measured}."]
        if self.failed:
            lines.append(f"    Does not hold: {'; '.join(self.failed)}.")
        return "\n".join(lines)


def percent(share: float) -> str:
    """A proportion as text."""
    return f"{100 * share:.1f}%"
