"""
The closed-form repair of a finished model: each layer's displacement is made smaller where that costs the subject
least. Holds the arithmetic; which displacements there are is in personalized.py, how far to go in budget.py.

A layer whose weight moved by D gives ``D x`` more. With ``M_s`` the second moments of its inputs when the personalized
model draws its subject, and ``M_r`` those of the base for what should stay, the D' that minimizes

    tr((D' - D) (M_s + e) (D' - D)^T)  +  w tr(D' M_r D'^T)

is ``D' = D (M_s + e) (M_s + e + w M_r)^-1``: the first term is what the subject loses, the second is what is left of
the drift. Both moments are relative to the mean square of the layer's own output on their prompts (`Moment`), so that
both terms are squared relative changes of the output, and one w fits all layers. For LoRA, ``D = s B A``, it is
``A' = A (M_s + e) (M_s + e + w M_r)^-1``. Parameters without directions, such as biases, become ``D / (1 + w)``.

A share from 0 to 1 stands in for w, which goes from infinity to 0: ``w = ((1 - share) / share)^2``. Drift is nearly in
proportion to it, as it is in plain interpolation, and few measurements find the share that meets a budget.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .functional import Moment


# e, relative to the mean eigenvalue of M_s. Of 0.001, 0.1, 1 and 10, at the same drift, 1 left the predictions of a
# tiny full model for its subject nearest to what they were, and 0.1 those of a LoRA.
_RIDGE = 1.0


class Repair(NamedTuple):
    """
    The repair of the layers of a model.

    Args:
        subject (`Mapping[str, Moment]`): ``M_s`` by the name of the weight.
        base (`Mapping[str, Moment]`): ``M_r``.
    """

    subject: Mapping[str, Moment]
    base: Mapping[str, Moment]

    def __call__(self, name: str, displacement: Tensor, share: float) -> Tensor:
        """What the displacement of a weight becomes: ``D / (1 + w)`` where there are no moments with directions."""
        moments = self.subject.get(name), self.base.get(name)
        if None in moments or not all(moment.root.numel() for moment in moments):
            return _kept(share) * displacement
        return repaired(displacement, *moments, share)


def scaled(name: str, displacement: Tensor, share: float) -> Tensor:
    """Plain interpolation, in the form of `Repair`."""
    return share * displacement


@torch.no_grad()
def repaired(displacement: Tensor, subject: Moment, base: Moment, share: float) -> Tensor:
    """
    ``D (M_s + e) (M_s + e + w M_r)^-1`` with ``w = ((1 - share) / share)^2``.

    With ``k = 1 / (1 + w)`` and ``k (M_s + e) + (1 - k) M_r = U U^T + c I`` it is, by the Woodbury identity, a product
    in which nothing larger than D or U is formed. In float64: what is left along U is a small difference of large
    terms.

    Args:
        displacement (`torch.Tensor`): (rows, n) or (rows, in, *kernel).
        share (`float`): From 0, which gives 0, to 1, which gives D.
    """
    if share in (0, 1):
        return share * displacement
    where = torch.device("cpu") if displacement.device.type == "mps" else displacement.device  # which has no float64
    rows = displacement.detach().flatten(1).to(where).double()
    (subject_root, subject_rest), (base_root, base_rest) = (
        (moment.root.to(where).double(), moment.rest.to(where).double()) for moment in (subject, base)
    )
    n, kept = rows.shape[1], _kept(share)
    diagonal = subject_rest + _RIDGE * (subject_rest + subject_root.square().sum() / n)
    root = torch.cat([kept**0.5 * subject_root, (1 - kept) ** 0.5 * base_root], dim=1)
    c = kept * diagonal + (1 - kept) * base_rest
    on_subject = kept * (rows @ subject_root @ subject_root.T + diagonal * rows)
    core = root.T @ root + c * torch.eye(root.shape[1], dtype=root.dtype, device=where)
    result = (on_subject - torch.linalg.solve(core, (on_subject @ root).T).T @ root.T) / c
    return result.view_as(displacement).to(displacement)


def _kept(share: float) -> float:
    """``1 / (1 + w)``."""
    return share**2 / (share**2 + (1 - share) ** 2)


def weight(share: float) -> float:
    """w, for a share above 0."""
    return ((1 - share) / share) ** 2
