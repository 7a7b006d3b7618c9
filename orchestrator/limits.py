"""Budgets and depth: pure, decided before anything is spent and again with every answer that carries usage."""

from dataclasses import dataclass

from orchestrator.errors import BudgetExceededError, DepthLimitError


@dataclass(slots=True)
class Budget:
    """What a run and everything below it may spend, in USD. ``limit`` None is no limit of its own; 0 is nothing.

    Spending is charged to the run and to every run above it, so a child can never have more than what is left
    to its parent.
    """

    limit: float | None = None
    parent: "Budget | None" = None
    spent: float = 0.0

    def charge(self, usd: float) -> None:
        """Add (or, with a negative amount, correct) what was spent."""
        self.spent += usd
        if self.parent is not None:
            self.parent.charge(usd)

    @property
    def remaining(self) -> float | None:
        """What may still be spent here; None if nothing limits it."""
        own = None if self.limit is None else max(0.0, self.limit - self.spent)
        above = self.parent.remaining if self.parent is not None else None
        known = [r for r in (own, above) if r is not None]
        return min(known) if known else None

    def check(self) -> None:
        """Raises BudgetExceededError if nothing is left here or above."""
        if self.remaining == 0.0:
            owner = self
            while owner.limit is None or owner.spent < owner.limit:
                assert owner.parent is not None  # something up there is used up, or remaining were not 0
                owner = owner.parent
            raise BudgetExceededError(
                f"budget used up: ${owner.spent:.4f} spent of ${owner.limit:.4f}",
                details={"limit_usd": owner.limit, "spent_usd": round(owner.spent, 6)},
            )


def check_depth(depth: int, max_depth: int) -> None:
    """Raises DepthLimitError when a run of ``depth`` (1: nobody delegated it) may not begin."""
    if depth > max_depth:
        raise DepthLimitError(
            f"delegation is limited to {max_depth} levels and this would be level {depth}",
            details={"depth": depth, "max_depth": max_depth},
        )
