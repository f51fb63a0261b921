"""What is learned, and how: the method, the stochastic step, and their variants."""

from typing import Annotated, Literal

from pydantic import Field

from tempflow_api.base import PositiveInt, Section, Text


class Tail(Section):
    """How a trajectory is completed after its last stochastic step; that takes nearly all of a
    rollout's evaluations. The default follows the schedule."""

    solver: Literal["euler", "dpm2"] = "euler"
    """``dpm2`` is DPM-Solver++(2M), of second order but for the first and the last step of a tail.
    Its images are not those of ``euler`` with as many steps, which is what is evaluated."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 1000
    """At most so many, evenly spread over the levels that are left; a tail never has more than
    there are. The default is the largest number of steps, so all of them."""


class Sampling(Section):
    """How an image is drawn during training."""

    steps: Annotated[int, Field(ge=2, le=1000)] = 10
    """Denoising steps T. Fewer than for display: 10 steps rank images as 40 do."""
    width: Annotated[int, Field(ge=8, le=8192)] = 512
    """Pixels."""
    height: Annotated[int, Field(ge=8, le=8192)] = 512
    """Pixels."""
    guidance_scale: Annotated[float, Field(ge=1, le=100)] = 4.5
    """Classifier-free guidance; 1 switches it off. FLUX.1 takes the number as an input of the
    network instead."""
    training_guidance_scale: Annotated[float, Field(ge=1, le=100)] | None = None
    """Guidance of the velocities that are trained on, where it is not that of the rollout: 1
    halves their cost, and trains on draws that another velocity has made."""
    negative_prompt: Text = ""
    """What classifier-free guidance steers away from. Qwen-Image uses a single space."""
    noise_level: Annotated[float, Field(gt=0, le=10)] = 0.7
    """The a of sigma_t = a sqrt(t / (1 - t)), the noise of the stochastic step. 0.7 for SD3.5,
    0.9 for FLUX.1, 1.2 for Qwen-Image; at the first step the noise added equals a."""
    sde: Literal["flow", "cps", "dance"] = "flow"
    """The stochastic step. ``flow``: the paper's, sigma_t as above. ``dance``: sigma_t = a at all
    noise levels (DanceGRPO, which takes a = 0.3). ``cps``: noise of s sin(a pi / 2) where the step
    lands at noise level s, and as much less of the predicted noise (Flow-CPS, which takes
    a = 0.8); its log-probability is minus the mean square distance, so it wants a clip range of
    its own."""
    tail: Tail = Tail()


class Advantage(Section):
    """How a reward becomes an advantage: (reward - mean) / (deviation + epsilon)."""

    scope: Literal["seed", "prompt"] = "seed"
    """Draws that are compared: those that share prompt, seed and step, or prompt and step."""
    deviation: Literal["group", "global", "none"] = "group"
    """Divide by the population standard deviation of the group, of all draws of that step in the
    epoch, or by nothing."""
    epsilon: Annotated[float, Field(gt=0, le=10)] = 1e-4
    """Added to the deviation, in units of the reward. Larger values keep groups that are solved
    from amplifying trivial differences."""
    clip_max: Annotated[float, Field(gt=0, le=1000)] = 5.0
    """Advantages beyond this are cut."""
    combination: Literal["raw", "normalised"] = "raw"
    """Of several rewards. ``raw``: the reward is the weighted sum of raw scores, so the one with
    the widest spread decides. ``normalised``: each reward becomes an advantage of its own, and
    the advantage is their weighted sum, so the weights decide."""


class BranchSet(Section):
    """Which of the candidates, ``branchSteps``, are stochastic and trained in an epoch."""

    choose: Literal["all", "first", "random", "window", "sliding"] = "all"
    """``all``; the ``first`` ones; some at ``random``, anew each epoch; consecutive ones, a
    ``window`` at a random place each epoch (Flow-GRPO-Fast) or one that is ``sliding`` from noise
    to image and stays at the end (MixGRPO)."""
    count: Annotated[int, Field(ge=1, le=999)] = 4
    """How many, unless all. MixGRPO's window is 4 steps, Flow-GRPO-Fast's 2."""
    every_epochs: PositiveInt = 25
    """Epochs after which a sliding window moves on by one step; 25 in MixGRPO."""


class Algorithm(Section):
    """TempFlow-GRPO (arXiv 2508.04324), and Flow-GRPO to compare it with."""

    method: Literal["tempflow", "flow-grpo"] = "tempflow"
    """``tempflow``: a deterministic trunk, one stochastic step a branch, its reward credited to
    that step. ``flow-grpo``: every step is stochastic, one reward for the whole trajectory."""
    epochs: PositiveInt = 100
    """Rounds of rollout, scoring and update."""
    prompts_per_epoch: Annotated[int, Field(ge=1, le=100_000)] = 48
    """Prompts drawn for an epoch, over all processes."""
    seeds_per_prompt: Annotated[int, Field(ge=1, le=1024)] = 4
    """Start noises a prompt, N. With ``flow-grpo`` this is the size of the group."""
    branches_per_seed: Annotated[int, Field(ge=1, le=1024)] = 6
    """Draws at each branch step, K. With ``flow-grpo`` 1, or with a branch set other than all the
    trajectories that share start noise and the deterministic steps before the first stochastic
    one."""
    branch_steps: Annotated[list[Annotated[int, Field(ge=0, le=998)]], Field(max_length=999)] = []
    """Steps that are stochastic and trained. An empty list takes all but the last, where almost
    no noise is left and likelihoods overflow."""
    branch_set: BranchSet = BranchSet()
    merge_below: Annotated[float, Field(ge=0, le=10)] = 0.0
    """A stochastic step that would add less noise than this jumps over the steps after it until it
    adds as much, at the farthest to the last noise level above zero (E-GRPO: steps of low entropy
    are merged). In units of the noise added, which is at most ``noiseLevel`` at the first step; 0
    merges nothing."""
    updates_per_epoch: Annotated[int, Field(ge=1, le=1000)] = 2
    """Optimizer steps an epoch, each over an equal share of its prompts."""
    weighting: Literal["noise-aware", "none", "guard"] = "noise-aware"
    """``noise-aware`` multiplies the policy loss at step k by sigma_k sqrt(|dt_k|) over its mean
    over the branch steps of the epoch (equation 7 of the paper). ``guard`` is GRPO-Guard's: ratios
    without their bias and scaled by the noise, and the loss divided by |dt_k|, so that the
    gradient is of one size at all steps; its ratios want a clip range of their own."""
    advantage: Advantage = Advantage()
    clip_range: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """The ratio is clipped to 1 plus or minus this. It acts on a log-probability averaged over
    the latent's dimensions, so small latents need more: 3e-3 at 200 dimensions."""
    kl_coefficient: Annotated[float, Field(ge=0, le=1000)] = 0.001
    """Weight of the divergence of the stochastic step from the model before training. 0 saves
    the reference forward."""
    kl_form: Literal["exact", "no-dt", "velocity"] = "exact"
    """The divergence: Kullback-Leibler's; that times |dt_k|, as in Flow-GRPO's code, which takes a
    coefficient ten times as large; or the mean square difference of the velocities, which counts
    all steps alike."""
    guidance_gradient: Literal["both", "conditional"] = "both"
    """Whether the gradient goes through the conditional and the unconditional velocity of
    classifier-free guidance, as in TempFlow-GRPO's code, or the first alone, as in Flow-GRPO's."""
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0
    """Every random number of the run is derived from this one."""
