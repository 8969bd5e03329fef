"""centroid_gates, the formula and its closed-form gradient, on any device.

    a[l, s, e] = -|v_s - c_le|^2 / (2 sigma^2)      g = softmax over the members of sample s
    da = g o (dg - <g, dg>)      dc_le = sum_s da (v_s - c_le) / sigma^2      dv_s = -sum_le of the same terms

|v|^2 cancels in the softmax. Queries and centroids are taken relative to the layer's mean centroid (of the
experts that some sample may use), which leaves the distances alone and keeps float32 exact enough for norms
of 60, where |v|^2 - 2 v c + |c|^2 would lose five digits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def centroid_gates(query: Tensor, centroids: Tensor, sigma: float, members: Tensor | None) -> Tensor:
    """Compute gates [L, S, E]; arguments as in `cram_kernels.centroid_gates`, checked, of one dtype."""
    offset, centred = _centre(query, centroids, members)
    logits = (offset @ centred.mT - 0.5 * centred.square().sum(-1).unsqueeze(1)) / sigma**2
    if members is None:
        return logits.softmax(-1)
    # A row without members keeps its logits here, because a softmax over -Inf alone has NaN for a derivative.
    others = ~members
    gates = logits.masked_fill(others & members.any(-1, keepdim=True), -torch.inf).softmax(-1)
    return gates.masked_fill(others, 0.0)


def centroid_gates_backward(
    grad: Tensor,
    gates: Tensor,
    query: Tensor,
    centroids: Tensor,
    sigma: float,
    members: Tensor | None,
    trained: int,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of query [S, D_q] and centroids [L, E, D_q], None where `needs` says no.

    Centroids before the last `trained` ones get zeros.
    """
    offset, centred = _centre(query, centroids, members)
    unused = gates == 0
    grad = grad.masked_fill(unused, 0.0)  # NaN of an unused expert would pass a product with zero
    dlogits = gates * (grad - (gates * grad).sum(-1, keepdim=True)) / sigma**2
    dlogits = dlogits.masked_fill(unused, 0.0)
    dquery = dcentroids = None
    if needs[0]:
        # The terms in v cancel: dlogits sums to zero over the experts.
        dquery = (dlogits @ _finite(centred)).sum(0)
    if needs[1]:
        first = centroids.shape[1] - trained
        of_trained, of = (dlogits[..., first:], centred[:, first:]) if first else (dlogits, centred)
        sums = of_trained.sum(1).unsqueeze(-1)
        dcentroids = of_trained.mT @ _finite(offset) - sums * of
        dcentroids = F.pad(dcentroids, (0, 0, first, 0)) if first else dcentroids
    return dquery, dcentroids


def _finite(values: Tensor) -> Tensor:
    """Return 0 for NaN and Inf: the gates of whoever uses such a row are NaN, and others must not see it."""
    return values.where(values.isfinite(), 0.0)


def _centre(query: Tensor, centroids: Tensor, members: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return query [L, S, D_q] and centroids [L, E, D_q] relative to each layer's mean used centroid."""
    if members is None:
        mean = centroids.sum(1, keepdim=True) / max(centroids.shape[1], 1)
    else:
        used = members.any(0)
        mean = centroids.where(used[:, None], 0.0).sum(1, keepdim=True) / used.sum().clamp(min=1)
    mean = _finite(mean)  # one corrupt centroid must not reach the other experts
    return query - mean, centroids - mean
