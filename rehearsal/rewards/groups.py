"""Parts of a reward normalised apart within their groups, and then summed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rehearsal.errors import RewardError

Floats = NDArray[np.float64]


def normalised_apart(
    parts: Mapping[str, ArrayLike], weights: Mapping[str, float], normalise: Callable[[Floats], Floats]
) -> Floats:
    """sum_k weight_k x normalise(part_k) (GDPO, arXiv:2601.05242).

    Summed first and normalised then, a part with a large spread drowns the others: (solved, no format) and
    (unsolved, format) differ or not as the weights will, and different combinations fall onto the same advantage.
    Normalised apart, each part has the same spread in every group where it varies at all, so the weights alone say how
    much it counts, and parts that do not vary count nothing.

    What it does not cure: a part that is rare keeps its full strength. A lone format pass in a group where nobody
    solves anything gets weight x (G - 1) / sqrt(G), which is what a lone solve gets times its weight. Gate such parts
    on success (:class:`rehearsal.rewards.composition.Gate`) if that is too much.

    The sum has mean 0 in each group already, so give it to an estimator that does not divide again (such as
    ``dr_grpo``, which leaves it as it is), or whiten it over the batch, as the paper does to keep its scale apart from
    the number of parts.

    Args:
        parts: rewards of shape (P, G) by name; NaN where an episode has none.
        weights: for each part.
        normalise: the estimator for one part, such as ``rehearsal.algorithms.advantages.grpo``.

    Returns:
        float64 of shape (P, G); NaN for an episode that lacks any of its parts, which stays out of all baselines.

    Raises:
        RewardError: where parts and weights have different names, or parts different shapes.
    """
    if set(parts) != set(weights) or not parts:
        raise RewardError(
            f"Parts and weights need the same names, not {', '.join(sorted(parts)) or 'none'} "
            f"and {', '.join(sorted(weights)) or 'none'}."
        )
    arrays = {name: np.asarray(part, dtype=np.float64) for name, part in parts.items()}
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) > 1:
        raise RewardError(f"The parts of a reward have different shapes: {', '.join(map(str, sorted(shapes)))}.")
    missing_PG = np.any([np.isnan(array) for array in arrays.values()], axis=0)
    total_PG = np.zeros(shapes.pop())
    for name, array in arrays.items():
        total_PG += weights[name] * normalise(np.where(missing_PG, np.nan, array))
    return np.where(missing_PG, np.nan, total_PG)
