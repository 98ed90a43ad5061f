"""
A budget in place of a weight: the largest drift that is accepted.
"""

import math
from collections.abc import Callable


_MOST = 20  # measurements


def fit_share(measure: Callable[[float], float], budget: float, tolerance: float = 0.01) -> tuple[float, float]:
    """
    The largest share of a displacement that stays within a budget of drift.

    Drift rises with the share, nearly in proportion to it, so that regula falsi needs two to four measurements. (It
    is the Illinois form, for functions that bend.)

    Args:
        measure (`Callable[[float], float]`):
            Moves the model to base + share * (trained - base), and returns its drift. The last call is with the share
            that is returned.
        budget (`float`): The largest drift, above 0.
        tolerance (`float`, *optional*, defaults to 0.01): How far below the budget is near enough, as a part of it.

    Returns:
        `tuple[float, float]`: The share and its drift: 1 if all of it is within the budget, and else a share with a
        drift between ``(1 - tolerance) * budget`` and the budget; where rounding leaves none there, the largest share
        that was found below.

    Raises:
        `ValueError`: If the budget is not a finite number above 0, or even the base, as it is rounded, has drifted more
            than that, or a drift is not finite.
    """
    check_budget(budget)
    drift = _finite(measure(1.0))
    if drift <= budget:
        return 1.0, drift
    aim = (1 - tolerance / 2) * budget
    # A share on each side of the aim, and by how much its drift is off it. Share 0 is taken to have no drift at first.
    below, above = [0.0, -aim], [1.0, drift - aim]
    last = None
    for number in range(_MOST):
        share = below[0] - below[1] * (above[0] - below[0]) / (above[1] - below[1])
        if number == 2 and below[0] == 0:
            share = 0.0  # does it have drift?
        drift = _finite(measure(share))
        if (1 - tolerance) * budget <= drift <= budget:
            return share, drift
        if share == 0 and drift > budget:
            raise ValueError(f"A budget of {budget:g} is below what rounding gives: the base itself has {drift:.2g}.")
        side, other = (below, above) if drift < aim else (above, below)
        side[:] = share, drift - aim
        if side is last:
            other[1] /= 2
        last = side
    return below[0], _finite(measure(below[0]))


def check_budget(budget: float) -> None:
    """Raise a ValueError unless the budget is a finite number above 0."""
    if not (math.isfinite(budget) and budget > 0):
        raise ValueError(f"A budget must be a finite number above 0, not {budget:g}.")


def _finite(drift: float) -> float:
    if not math.isfinite(drift):
        raise ValueError(f"The drift is {drift}: the model gives NaN or infinity.")
    return drift
