"""The objective: a clipped policy surrogate, and the divergence from where training began."""

import torch
from torch import Tensor


def surrogate_BK(
    log_prob_BK: Tensor,
    old_log_prob_BK: Tensor,
    advantage_BK: Tensor,
    *,
    weight_B: Tensor,
    clip_range: float,
) -> Tensor:
    """-w min(r A, clip(r, 1 - c, 1 + c) A) of every draw (TempFlow-GRPO, eq. 7), [B, K].

    r = exp(log_prob - old_log_prob) is the probability ratio of the draw under the weights now
    and at the rollout.
    """
    ratio_BK = torch.exp(log_prob_BK - old_log_prob_BK)
    clipped_BK = ratio_BK.clamp(1 - clip_range, 1 + clip_range)
    gain_BK = torch.minimum(ratio_BK * advantage_BK, clipped_BK * advantage_BK)
    return -weight_B.to(gain_BK)[:, None] * gain_BK


def kl_B(mean_BCHW: Tensor, reference_mean_BCHW: Tensor, std_B: Tensor) -> Tensor:
    """KL of two normal steps of equal deviation, averaged over the latent's dimensions, [B].

    mean((mu - mu_ref)^2) / (2 eta^2); Flow-GRPO's code divides by 2 g^2 instead, which is this
    times |dt|.
    """
    squared_B = (mean_BCHW - reference_mean_BCHW.detach()).square().mean(dim=(-3, -2, -1))
    return squared_B / (2 * std_B.to(squared_B) ** 2)


def clipped_share_BK(log_prob_BK: Tensor, old_log_prob_BK: Tensor, clip_range: float) -> Tensor:
    """1 where the ratio left the clip range, else 0, [B, K] float32."""
    return ((log_prob_BK - old_log_prob_BK).exp() - 1).abs().gt(clip_range).float()
