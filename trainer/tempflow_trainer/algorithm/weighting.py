"""How much each branch step counts in the policy loss."""

import torch
from torch import Tensor


def noise_aware_S(noise_std_T: Tensor, steps: tuple[int, ...]) -> Tensor:
    """w_k = eta_k / mean(eta) over the branch steps (TempFlow-GRPO, eq. 7), [S] float64.

    The mean weight is 1, so the balance of policy loss and KL stays that of Flow-GRPO. The noise
    level cancels; the constants of the reference code are 1 / mean(eta) of one schedule each.
    """
    eta_S = noise_std_T[list(steps)]
    return eta_S / eta_S.mean()


def weights_S(weighting: str, noise_std_T: Tensor, steps: tuple[int, ...]) -> Tensor:
    """The weights that ``spec.algorithm.weighting`` names, [S] float64."""
    if weighting == "noise-aware":
        return noise_aware_S(noise_std_T, steps)
    return torch.ones(len(steps), dtype=torch.float64)
