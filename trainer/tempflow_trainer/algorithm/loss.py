"""The objective: a clipped policy surrogate, and the divergence from where training began."""

import torch
from torch import Tensor


def surrogate_BK(
    log_ratio_BK: Tensor, advantage_BK: Tensor, *, weight_B: Tensor, clip_range: float
) -> Tensor:
    """-w min(r A, clip(r, 1 - c, 1 + c) A) of every draw (TempFlow-GRPO, eq. 7), [B, K].

    r = exp(log_ratio) is the probability ratio of the draw under the weights now and at the
    rollout.
    """
    ratio_BK = torch.exp(log_ratio_BK)
    clipped_BK = ratio_BK.clamp(1 - clip_range, 1 + clip_range)
    gain_BK = torch.minimum(ratio_BK * advantage_BK, clipped_BK * advantage_BK)
    return -weight_B.to(gain_BK)[:, None] * gain_BK


def guarded_log_ratio_BK(
    log_ratio_BK: Tensor, mean_BCHW: Tensor, old_mean_BCHW: Tensor, std_B: Tensor
) -> Tensor:
    """eta (log r + mean((mu - mu_old)^2) / (2 eta^2)) (GRPO-Guard, 2510.22319), [B, K].

    The mean log ratio of fresh draws is minus the term that is added here, so the ratio is too
    small on average, most where eta is; the factor eta makes its spread equal over the steps. What
    remains is mean(noise (mu - mu_old)).
    """
    std = std_B.to(log_ratio_BK)
    moved_B = (mean_BCHW - old_mean_BCHW).square().mean(dim=(-3, -2, -1)) / (2 * std**2)
    return std[:, None] * (log_ratio_BK + moved_B[:, None])


def kl_B(mean_BCHW: Tensor, reference_mean_BCHW: Tensor, std_B: Tensor) -> Tensor:
    """KL of two normal steps of equal deviation, averaged over the latent's dimensions, [B].

    mean((mu - mu_ref)^2) / (2 eta^2).
    """
    squared_B = (mean_BCHW - reference_mean_BCHW.detach()).square().mean(dim=(-3, -2, -1))
    return squared_B / (2 * std_B.to(squared_B) ** 2)


def kl_without_dt_B(
    mean_BCHW: Tensor, reference_mean_BCHW: Tensor, std_B: Tensor, dt_B: Tensor
) -> Tensor:
    """The same with g in place of eta = g sqrt(|dt|), as Flow-GRPO's code has it: KL |dt|, [B]."""
    return kl_B(mean_BCHW, reference_mean_BCHW, std_B / dt_B.abs().sqrt())


def velocity_distance_B(velocity_BCHW: Tensor, reference_BCHW: Tensor) -> Tensor:
    """mean((v - v_ref)^2): every step counts alike, whatever its noise (DiffusionNFT, AWM), [B]."""
    return (velocity_BCHW - reference_BCHW.detach()).square().mean(dim=(-3, -2, -1))


def clipped_share_BK(log_ratio_BK: Tensor, clip_range: float) -> Tensor:
    """1 where the ratio left the clip range, else 0, [B, K] float32."""
    return (log_ratio_BK.exp() - 1).abs().gt(clip_range).float()
