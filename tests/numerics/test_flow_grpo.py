"""Flow-GRPO as a limiting case of the same loop, against a plain version of it."""

import math

import pytest
import torch
from torch import Tensor

from tempflow_trainer import loop, seeds
from tests.numerics.toys import FLOW_GRPO, Brightness, Mlp, gradient, run_of, spec_of, still

STEPS, PROMPTS, SEEDS, A, CLIP = 5, 4, 3, 0.7, 3e-3


def plain_flow_grpo(
    model: Mlp, texts: list[str], deviation: str, weighting: str
) -> tuple[Tensor, float]:
    """Gradient of the loss of epoch 0 and the mean reward, one trajectory after the other."""
    sigmas = model.schedule(STEPS, 0, 0).sigmas.tolist()
    trained = STEPS - 1

    def moments(x: Tensor, k: int, text: Tensor) -> tuple[Tensor, float, Tensor]:
        t, dt = sigmas[k], sigmas[k + 1] - sigmas[k]
        v = model.transformer(x.flatten()[None], torch.tensor([t]), text).view_as(x)
        g2 = A**2 * t / (1 - (sigmas[1] if k == 0 else t))
        mean = x * (1 + g2 * dt / (2 * t)) + v * dt * (1 + g2 * (1 - t) / (2 * t))
        return mean, math.sqrt(g2 * -dt), x + dt * v

    transitions, rewards = [], []
    for position, text in enumerate(texts):
        features = model.encode([text]).tensors["text"]
        for seed in range(SEEDS):
            x = seeds.normal(model.shape, 0, 0, position, seed, "start")
            path = []
            with torch.no_grad():
                for k in range(trained):
                    mean, eta, _ = moments(x, k, features)
                    noise = seeds.normal(model.shape, 0, 0, position, seed, "branch", k, 0)
                    y = mean + eta * noise
                    path.append((x, y, k, features))
                    x = y
                x = moments(x, trained, features)[2]
            transitions.append(path)
            rewards.append(Brightness().score(model.decode(x[None]), [""], [{}])[0])
    rewards_PN = torch.stack(rewards).view(PROMPTS, SEEDS)
    advantage_PN = rewards_PN - rewards_PN.mean(dim=1, keepdim=True)
    if deviation == "group":
        advantage_PN = advantage_PN / (rewards_PN.std(dim=1, keepdim=True, correction=0) + 1e-4)
    if deviation == "global":
        advantage_PN = advantage_PN / (rewards_PN.std(correction=0) + 1e-4)
    eta_S = [moments(torch.zeros(model.shape), k, features)[1] for k in range(trained)]
    weight_S = [eta / (sum(eta_S) / trained) for eta in eta_S]
    total = torch.zeros(())
    for path, advantage in zip(transitions, advantage_PN.flatten(), strict=True):
        for x, y, k, features in path:
            mean, eta, _ = moments(x, k, features)
            log_prob = torch.distributions.Normal(mean, eta).log_prob(y).mean()
            ratio = (log_prob - log_prob.detach()).exp()
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            weight = weight_S[k] if weighting == "noise-aware" else 1.0
            total = total + weight * torch.max(-advantage * ratio, -advantage * clipped)
    (total / (PROMPTS * SEEDS * trained)).backward()
    found = torch.cat([p.grad.flatten() for p in model.transformer.parameters()])
    return found, float(rewards_PN.mean())


@pytest.mark.parametrize("weighting", ["none", "noise-aware"])
@pytest.mark.parametrize("deviation", ["group", "global", "none"])
def test_flow_grpo_is_the_plain_one(deviation: str, weighting: str) -> None:
    changes = {
        **FLOW_GRPO,
        "algorithm.seedsPerPrompt": SEEDS,
        "algorithm.advantage": {"scope": "prompt", "deviation": deviation},
        "algorithm.weighting": weighting,
    }
    run = still(run_of(spec_of(changes)))
    metrics = loop.run_epoch(run, 0)
    texts = [run.order.prompt_at(0, position).text for position in range(PROMPTS)]
    expected, reward = plain_flow_grpo(Mlp(), texts, deviation, weighting)
    assert metrics["reward"] == pytest.approx(reward, abs=1e-6)
    found = gradient(run)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.norm()))
    assert run.policy.evaluations["rollout"] == PROMPTS * SEEDS * STEPS
    assert run.policy.evaluations["training"] == PROMPTS * SEEDS * (STEPS - 1)
