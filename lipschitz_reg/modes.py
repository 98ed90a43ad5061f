"""
How the penalty acts on the terms: by the gradient before the step, or by a move after it. Each mode is a class; to add
one, write it here and name it in `MODES`. Holds no arithmetic of a term (terms.py) and no hooks (regularizer.py).

A row is a term with its coefficient ``c = weight * r_i`` and its learning rate.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .functional import ball_fraction
from .terms import Term


class Row(NamedTuple):
    term: Term
    coefficient: float
    rate: Any


class Mode:
    """
    What all modes have. `uses_gradients`: whether it needs those of the loss; `uses_rates`: the learning rates. What
    it can act on: `products` of LoRA, the space of `layers`, and adapters on weights that have `offsets` from their
    anchors.
    """

    uses_gradients = uses_rates = products = layers = offsets = False

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
        return [row.coefficient * row.term.squared() for row in rows]


class Coupled(Mode):
    """Adds the gradient, ``2 c (theta - anchor)``, before the optimizer reads it: the loss of the paper."""

    uses_gradients = products = layers = offsets = True

    def before_step(self, rows: Sequence[Row], scale: Tensor | float) -> list[Tensor]:
        """A parameter without a gradient counts in the loss, but is not moved."""
        return [
            row.term.add_gradient(row.coefficient * scale) / scale
            if row.term.has_gradient()
            else row.coefficient * row.term.squared()
            for row in rows
        ]


class Proximal(Mode):
    """Moves parameters after the step to ``(theta + 2 c anchor) / (1 + 2 c)``, with ``c = rate * weight * r_i``."""

    uses_rates = True

    def after_step(self, rows: Sequence[Row], taken: Tensor | float) -> list[Tensor]:
        values = []
        for term, coefficient, rate in rows:
            c = rate * taken * coefficient if term.has_gradient() else 0.0
            fraction = 2 * c / (1 + 2 * c)
            values.append(coefficient * (1 - fraction) ** 2 * term.pull(fraction))
        return values


class Projected(Mode):
    """Moves all parameters after the step to a distance of at most `radius` from the anchors, together."""

    products = True

    def __init__(self, radius: float | None = None):
        if radius is None:
            raise ValueError("mode 'projected' needs a `radius`, the largest distance from the anchors.")
        super().__init__(radius)

    def after_step(self, rows: Sequence[Row], taken: Tensor | float) -> list[Tensor]:
        """There is no term in the loss."""
        fraction = ball_fraction([row.term.squared() for row in rows], self.radius) if rows else 0
        if isinstance(fraction, Tensor) and (fraction.device.type != "cpu" or fraction > 0):
            for row in rows:
                row.term.pull(fraction)
        return []

    def values(self, rows: Sequence[Row]) -> list[Tensor]:
        return []


MODES = {"coupled": Coupled, "proximal": Proximal, "projected": Projected}
