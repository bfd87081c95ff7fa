"""Averages of the weights over the last share of a training, by a power function, and any one as a sum of others.

The average at a step t weights the weights of an earlier step s in proportion to s^gamma. Its length is sigma_rel, the
standard deviation of that profile as a share of t: 0.1 averages over about the last tenth of a training, however long
that is.
Source: Karras et al. 2023, "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), section 3 and
appendix C.
"""

from collections.abc import Sequence

import numpy as np

# The lengths that a training tracks, as the paper does, by the names of their averages in a checkpoint.
TRACKED = {"ema_0.05": 0.05, "ema_0.1": 0.10}
# Above it gamma is negative, and the first steps weigh most.
LONGEST = 0.28
# In the first steps the weights are averaged in after each one, later at least so often from the first step to any one.
UPDATES = 4096


def gamma_of(length: float) -> float:
    """The exponent of the profile of a length in (0, LONGEST].

    Source: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), solved for gamma.
    """
    t = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


def last_update(step: int) -> int:
    """The last step up to this one after which the weights are averaged in, a multiple of a power of two.

    Not every one: after a million steps 1 - decay would be so small that an average in fp32 hardly moves.
    """
    period = 1 << max(0, (step // UPDATES).bit_length() - 1)
    return step - step % period


def decay(gamma: float, step: int) -> float:
    """The beta of average <- beta x average + (1 - beta) x weights at an update; 0 at the first, step 1.

    The weights stand for the steps since the update before.  Source: EDM2, eq. 5.
    """
    return float((last_update(step - 1) / step) ** (gamma + 1.0))


def inner_products(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Integrals of the products of two profiles, (gamma + 1) s^gamma / t^(gamma + 1) on s in [0, t]; broadcast."""
    ratio, exponent = np.minimum(t_a / t_b, t_b / t_a), np.where(t_a < t_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio**exponent / np.maximum(t_a, t_b)


def coefficients(
    steps: list[int], lengths: list[float], step: int, wanted: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """By what averages of these steps and lengths are multiplied so that their sum is the average of a step and length.

    wanted: such lengths, W.
    The least squares between the profiles, as in EDM2, appendix C.3. Unlike there the coefficients add up to 1: what is
    missing of that would make all weights smaller.
    Returns them, [W, N], and what is left of each wanted profile, [W]: the norm of the difference over its own.
    """
    t, gamma = np.array(steps, float), np.array([gamma_of(one) for one in lengths])
    last, gammas = np.float64(step), np.array([gamma_of(one) for one in wanted])
    # Of the averages a column, of the wanted ones a row.
    norms, norm = np.sqrt(inner_products(t, gamma, t, gamma)), np.sqrt(inner_products(last, gammas, last, gammas))
    products = inner_products(t[:, None], gamma[:, None], t, gamma) / np.outer(norms, norms)
    with_wanted = inner_products(t[:, None], gamma[:, None], last, gammas) / np.outer(norms, norm)
    # The coefficients of the profiles over their norms, which add up to 1 once they are divided by these.
    constrained = np.block([[products, 1.0 / norms[:, None]], [1.0 / norms, 0.0]])
    found = np.linalg.solve(constrained, np.vstack([with_wanted, 1.0 / norm]))[:-1]
    left = 1.0 + np.sum(found * (products @ found - 2.0 * with_wanted), axis=0)
    return (found * norm / norms[:, None]).T, np.sqrt(np.maximum(left, 0.0))
