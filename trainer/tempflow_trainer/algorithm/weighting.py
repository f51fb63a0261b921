"""How much each branch step counts in the policy loss.

Whatever the weighting, the mean weight over the steps that an epoch branches is 1: the balance of
policy loss and KL is the same for all of them, and does not move when the steps do.
"""

import torch
from torch import Tensor

from tempflow_trainer.algorithm.sde import Transitions


def raw_S(weighting: str, steps: Transitions) -> Tensor:
    """Weights up to their mean, [S] float64.

    ``noise-aware``: eta_k (TempFlow-GRPO, eq. 7). ``guard``: 1 / |dt_k| (GRPO-Guard, 2510.22319),
    whose ratio already counts a step by eta_k, see ``loss.guarded_log_ratio_BK``. ``none``: 1.
    """
    if weighting == "noise-aware":
        return steps.noise_std_S
    if weighting == "guard":
        return 1 / steps.dt_S.abs()
    return torch.ones_like(steps.dt_S)


def weights_S(weighting: str, steps: Transitions) -> Tensor:
    """The weights that ``spec.algorithm.weighting`` names, [S] float64, of mean 1.

    The noise level cancels; the constants 2.25, 1.73 and 1.53 of the reference code are
    1 / mean(eta) of one schedule each. GRPO-Guard's code leaves 1 / |dt| as it is, which makes the
    loss about T times larger.
    """
    weight_S = raw_S(weighting, steps)
    return weight_S / weight_S.mean()
