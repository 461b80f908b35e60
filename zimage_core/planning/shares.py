"""To whom a busy device's time goes: projects share it evenly, priorities by their weights."""

from dataclasses import dataclass

INTERACTIVE, NORMAL, BACKGROUND = "interactive", "normal", "background"
WEIGHTS = {INTERACTIVE: 16, NORMAL: 4, BACKGROUND: 1}
"""Whoever has the least still has a share: nobody waits for ever."""

DEFAULT_PROJECT = "default"


@dataclass(frozen=True, slots=True)
class Share:
    """Whose work it is, and how urgent. All work of one share stands in one line."""

    project: str = DEFAULT_PROJECT
    priority: str = NORMAL
    own_weight: float = 0.0
    """In the place of that of its priority."""

    @property
    def weight(self) -> float:
        """How much of the time this line gets, next to the weights of other lines."""
        return self.own_weight or WEIGHTS[self.priority]


COMMON = Share()
"""Of work that is nobody's in particular."""
