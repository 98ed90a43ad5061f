"""
How the penalty acts on the terms: by the gradient before the step, or by a move after it. Each mode is a class; to add
one, write it here and name it in `MODES`. Holds no arithmetic of a term (terms.py) and no hooks (regularizer.py).

A row is a term with its coefficient ``c = weight * r_i`` and the param group that has its learning rate.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .functional import ball_fraction, weighted_sum
from .terms import Term, add_gradients, pull, squares


class Row(NamedTuple):
    term: Term
    coefficient: float
    group: Mapping[str, Any] | None  # of the optimizer; a product of LoRA has none

    @property
    def rate(self) -> Any:
        """The learning rate as it is now."""
        return self.group["lr"]


class Mode:
    """
    What all modes have. `uses_gradients`: whether it needs those of the loss; `uses_rates`: the learning rates. What
    it can act on: `products` of LoRA, the space of `layers`, and adapters on weights that have `offsets` from their
    anchors. `at_once`: whether it has to move all parameters together.
    """

    uses_gradients = uses_rates = products = layers = offsets = at_once = False

    def __init__(self, radius: float | None = None):
        self.radius = radius

    def before_step(self, rows: Sequence[Row], scale: Tensor | float) -> list[Tensor]:
        """
        Returns the terms of the loss.

        Args:
            scale: What the gradients are still multiplied by.
        """
        return []

    def after_step(self, rows: Sequence[Row], taken: Tensor | float) -> list[Tensor]:
        """
        Returns the terms of the loss, after the move.

        Args:
            taken: 0 if the step was not taken, because a gradient overflowed; else 1.
        """
        return []

    def values(self, rows: Sequence[Row]) -> list[Tensor]:
        """The terms of the loss as they are now."""
        of_terms = squares([row.term for row in rows])
        return [weighted_sum(of_terms, [row.coefficient for row in rows])] if rows else []


class Coupled(Mode):
    """Adds the gradient, ``2 c (theta - anchor)``, before the optimizer reads it: the loss of the paper."""

    uses_gradients = products = layers = offsets = True

    def before_step(self, rows: Sequence[Row], scale: Tensor | float) -> list[Tensor]:
        """A parameter without a gradient counts in the loss, but is not moved."""
        moved, others = [], []
        for row in rows:
            (moved if row.term.has_gradient() else others).append(row)
        values = add_gradients([row.term for row in moved], [row.coefficient for row in moved], scale)
        return values + self.values(others)


class Proximal(Mode):
    """Moves parameters after the step to ``(theta + 2 c anchor) / (1 + 2 c)``, with ``c = rate * weight * r_i``."""

    uses_rates = True

    def after_step(self, rows: Sequence[Row], taken: Tensor | float) -> list[Tensor]:
        steps = [row.rate * taken * row.coefficient if row.term.has_gradient() else 0.0 for row in rows]
        fractions = [2 * c / (1 + 2 * c) for c in steps]
        before = pull([row.term for row in rows], fractions)
        factors = [row.coefficient * (1 - fraction) ** 2 for row, fraction in zip(rows, fractions, strict=True)]
        return [weighted_sum(before, factors)] if rows else []


class Projected(Mode):
    """Moves all parameters after the step to a distance of at most `radius` from the anchors, together."""

    products = at_once = True

    def __init__(self, radius: float | None = None):
        if radius is None:
            raise ValueError("mode 'projected' needs a `radius`, the largest distance from the anchors.")
        super().__init__(radius)

    def after_step(self, rows: Sequence[Row], taken: Tensor | float) -> list[Tensor]:
        """There is no term in the loss."""
        terms = [row.term for row in rows]
        fraction = ball_fraction(squares(terms), self.radius) if rows else 0
        if isinstance(fraction, Tensor) and (fraction.device.type != "cpu" or fraction > 0):
            pull(terms, [fraction] * len(rows), measured=False)
        return []

    def values(self, rows: Sequence[Row]) -> list[Tensor]:
        return []


MODES = {"coupled": Coupled, "proximal": Proximal, "projected": Projected}
