"""The methods the plain way: one trajectory after the other, in double precision, from formulas.

Shares with the trainer the network of the toy, the names of random numbers, and nothing else.
"""

import copy
import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer import seeds
from tests.numerics.toys import Mlp, Perceptron


@dataclass
class Transition:
    """What one draw leaves to learn from."""

    k: int
    landing: int
    x: Tensor
    y: Tensor
    text: Tensor
    position: int
    seed: int
    image: int
    log_prob: float = 0.0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))


class Plain:
    """A run of ``spec`` on ``model``; its weights are those of ``network`` after ``epoch``s."""

    def __init__(self, spec: JobSpec, model: Mlp) -> None:
        self.spec, self.model = spec, model
        self.network: Perceptron = copy.deepcopy(model.transformer).double()
        self.before: Perceptron = copy.deepcopy(self.network).requires_grad_(False)
        self.sigmas: list[float] = model.schedule(spec.sampling.steps, 0, 0).sigmas.tolist()
        self.last = spec.sampling.steps
        self.negative = model.encode([spec.sampling.negative_prompt]).tensors["text"].double()
        optimizer = spec.optimizer
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=optimizer.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
        )

    # The network and the stochastic step.

    def velocity(
        self, x: Tensor, t: float, text: Tensor, scale: float, network: Perceptron | None = None
    ) -> Tensor:
        network = network or self.network

        def of(words: Tensor) -> Tensor:
            found: Tensor = network(x.flatten()[None], torch.tensor([t]).double(), words)
            return found.view_as(x)

        if scale == 1 or not self.model.classifier_free:
            return of(text)
        plain = of(self.negative)
        if self.spec.algorithm.guidance_gradient == "conditional":
            plain = plain.detach()
        return plain + scale * (of(text) - plain)

    def noise_std(self, k: int, landing: int) -> float:
        a, t, to = self.spec.sampling.noise_level, self.sigmas[k], self.sigmas[landing]
        if self.spec.sampling.sde == "cps":
            return to * math.sin(a * math.pi / 2)
        if self.spec.sampling.sde == "dance":
            return a * math.sqrt(t - to)
        return a * math.sqrt(t / (1 - (to if k == 0 else t))) * math.sqrt(t - to)

    def mean(self, x: Tensor, v: Tensor, k: int, landing: int) -> Tensor:
        t, to = self.sigmas[k], self.sigmas[landing]
        image, noise, std = x - t * v, x + (1 - t) * v, self.noise_std(k, landing)
        if self.spec.sampling.sde == "cps":
            return (1 - to) * image + math.sqrt(to**2 - std**2) * noise
        g2 = std**2 / (t - to)
        score = -(x - (1 - t) * image) / t**2
        return x + (to - t) * (v - g2 / 2 * score)

    def log_prob(self, y: Tensor, mean: Tensor, std: float) -> Tensor:
        if self.spec.sampling.sde == "cps":
            return -((y - mean) ** 2).mean()
        found: Tensor = torch.distributions.Normal(mean, std).log_prob(y).mean()
        return found

    # Which steps.

    def steps(self, epoch: int) -> list[tuple[int, int]]:
        """Stochastic steps and where they land."""
        algorithm = self.spec.algorithm
        among = sorted(algorithm.branch_steps) or list(range(self.last - 1))
        n, chosen = algorithm.branch_set.count, algorithm.branch_set
        if chosen.choose == "first":
            among = among[:n]
        if chosen.choose == "random":
            order = seeds.permutation(len(among), algorithm.seed, "branch steps", epoch)
            among = [step for i, step in enumerate(among) if i in order[:n]]
        if chosen.choose in ("window", "sliding"):
            places = [among[i : i + n] for i in range(len(among) - n + 1)]
            place = seeds.permutation(len(places), algorithm.seed, "window", epoch)[0]
            if chosen.choose == "sliding":
                place = min(epoch // chosen.every_epochs, len(places) - 1)
            among = places[place]
        jumps = []
        for k in among:
            landing = k + 1
            while self.noise_std(k, landing) < algorithm.merge_below and landing < self.last - 1:
                landing += 1
            jumps.append((k, landing))
        if algorithm.method == "tempflow":
            return jumps
        followed: list[tuple[int, int]] = []
        for k, landing in jumps:
            if not followed or followed[-1][1] <= k:
                followed.append((k, landing))
        return followed

    # Rollout.

    def tail(self, x: Tensor, start: int, text: Tensor) -> Tensor:
        scale, tail = self.spec.sampling.guidance_scale, self.spec.sampling.tail
        left = self.last - start
        count = min(tail.steps, left)
        nodes = [start + math.floor(i * left / count + 0.5) for i in range(count + 1)]
        older: tuple[float, Tensor] | None = None

        def log_snr(t: float) -> float:
            return math.log(1 - t) - math.log(t)

        for k, after in pairwise(nodes):
            t, to = self.sigmas[k], self.sigmas[after]
            v = self.velocity(x, t, text, scale)
            image = x - t * v
            if tail.solver == "euler" or older is None or to == 0:
                x = x + (to - t) * v
            else:
                h = log_snr(to) - log_snr(t)
                r = (log_snr(t) - log_snr(older[0])) / h
                predicted = (1 + 1 / (2 * r)) * image - 1 / (2 * r) * older[1]
                x = to / t * x - (1 - to) * (math.exp(-h) - 1) * predicted
            older = (t, image)
        return x

    def draw(self, x: Tensor, k: int, landing: int, text: Tensor, *who: int) -> Tensor:
        position, seed, b, epoch = who
        v = self.velocity(x, self.sigmas[k], text, self.spec.sampling.guidance_scale)
        name = (self.spec.algorithm.seed, epoch, position, seed, "branch", k, b)
        noise = seeds.normal(self.model.shape, *name).double()
        return self.mean(x, v, k, landing) + self.noise_std(k, landing) * noise

    def roll_out(
        self, epoch: int, position: int, seed: int, text: Tensor, images: list[Tensor]
    ) -> list[Transition]:
        algorithm, steps = self.spec.algorithm, self.steps(epoch)
        found = []
        start = seeds.normal(self.model.shape, algorithm.seed, epoch, position, seed, "start")

        def deterministic(x: Tensor, begin: int, end: int) -> Tensor:
            for k in range(begin, end):
                v = self.velocity(x, self.sigmas[k], text, self.spec.sampling.guidance_scale)
                x = x + (self.sigmas[k + 1] - self.sigmas[k]) * v
            return x

        branches = [[step] for step in steps] if algorithm.method == "tempflow" else [steps]
        for branch in branches:
            for b in range(algorithm.branches_per_seed):
                x, at = start.double(), 0
                for k, landing in branch:
                    x = deterministic(x, at, k)
                    y = self.draw(x, k, landing, text, position, seed, b, epoch)
                    found.append(Transition(k, landing, x, y, text, position, seed, len(images)))
                    x, at = y, landing
                images.append(self.tail(x, at, text))
        return found

    # Advantages and loss.

    def rewards(self, images: list[Tensor]) -> list[float]:
        shape = (3, *self.model.shape[1:])
        weights = seeds.normal(shape, 0, "brightness").double()
        return [float((image.sigmoid() * weights).mean()) for image in images]

    def advantages(
        self, transitions: list[Transition], rewards: list[float], prompt: list[int]
    ) -> list[float]:
        rule, found = self.spec.algorithm.advantage, []
        for one in transitions:
            step = [t for t in transitions if t.k == one.k]
            group = [
                rewards[t.image]
                for t in step
                if (
                    (t.position, t.seed) == (one.position, one.seed)
                    if rule.scope == "seed"
                    else prompt[t.position] == prompt[one.position]
                )
            ]
            every = [rewards[t.image] for t in step]
            value = rewards[one.image] - sum(group) / len(group)
            compared = {"group": group, "global": every, "none": None}[rule.deviation]
            if compared is not None:
                middle = sum(compared) / len(compared)
                variance = sum((r - middle) ** 2 for r in compared) / len(compared)
                value /= math.sqrt(variance) + rule.epsilon
            found.append(max(-rule.clip_max, min(rule.clip_max, value)))
        return found

    def weight(self, k: int, landing: int, steps: list[tuple[int, int]]) -> float:
        def raw(k: int, landing: int) -> float:
            return {
                "none": 1.0,
                "noise-aware": self.noise_std(k, landing),
                "guard": 1 / (self.sigmas[k] - self.sigmas[landing]),
            }[self.spec.algorithm.weighting]

        return raw(k, landing) / (sum(raw(*step) for step in steps) / len(steps))

    def training_scale(self) -> float:
        sampling = self.spec.sampling
        return sampling.training_guidance_scale or sampling.guidance_scale

    def loss(self, one: Transition, advantage: float, steps: list[tuple[int, int]]) -> Tensor:
        algorithm, t = self.spec.algorithm, self.sigmas[one.k]
        std, scale = self.noise_std(one.k, one.landing), self.training_scale()
        v = self.velocity(one.x, t, one.text, scale)
        mean = self.mean(one.x, v, one.k, one.landing)
        log_ratio = self.log_prob(one.y, mean, std) - one.log_prob
        if algorithm.weighting == "guard":
            log_ratio = std * (log_ratio + ((mean - one.mean) ** 2).mean() / (2 * std**2))
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - algorithm.clip_range, 1 + algorithm.clip_range)
        total = -self.weight(one.k, one.landing, steps) * torch.min(
            ratio * advantage, clipped * advantage
        )
        if algorithm.kl_coefficient > 0:
            with torch.no_grad():
                v_before = self.velocity(one.x, t, one.text, scale, self.before)
            before = self.mean(one.x, v_before, one.k, one.landing)
            squared = ((mean - before) ** 2).mean()
            dt = t - self.sigmas[one.landing]
            total = (
                total
                + algorithm.kl_coefficient
                * {
                    "exact": squared / (2 * std**2),
                    "no-dt": squared / (2 * std**2 / dt),
                    "velocity": ((v - v_before) ** 2).mean(),
                }[algorithm.kl_form]
            )
        return total

    def epoch(self, epoch: int) -> None:
        """Rollout, advantages, updates; prompts in their order, each once."""
        algorithm, steps = self.spec.algorithm, self.steps(epoch)
        texts = self.spec.data.prompts or []
        prompt = [position % len(texts) for position in range(algorithm.prompts_per_epoch)]
        transitions: list[Transition] = []
        images: list[Tensor] = []
        with torch.no_grad():
            for position in range(algorithm.prompts_per_epoch):
                text = self.model.encode([texts[prompt[position]]]).tensors["text"].double()
                for seed in range(algorithm.seeds_per_prompt):
                    transitions += self.roll_out(epoch, position, seed, text, images)
            advantages = self.advantages(transitions, self.rewards(images), prompt)
            for one in transitions:
                v = self.velocity(one.x, self.sigmas[one.k], one.text, self.training_scale())
                one.mean = self.mean(one.x, v, one.k, one.landing)
                std = self.noise_std(one.k, one.landing)
                one.log_prob = float(self.log_prob(one.y, one.mean, std))
        share = algorithm.prompts_per_epoch // algorithm.updates_per_epoch
        for update in range(algorithm.updates_per_epoch):
            mine = [i for i, one in enumerate(transitions) if one.position // share == update]
            self.optimizer.zero_grad()
            losses = [self.loss(transitions[i], advantages[i], steps) for i in mine]
            torch.stack(losses).mean().backward()
            parameters = list(self.network.parameters())
            torch.nn.utils.clip_grad_norm_(parameters, self.spec.optimizer.max_grad_norm)
            self.optimizer.step()

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.network.parameters()])
