"""What a run will do: the trainer's own explanation as a child process, and how it reads."""

import subprocess
import sys
from collections.abc import Iterator, Sequence

from tempflow.refused import Refused
from tempflow_api import naming
from tempflow_api.errors import TempFlowError, of_code
from tempflow_api.explanation import Explanation
from tempflow_api.v1alpha1 import TempFlowGRPOJob

EXPLAINER = (sys.executable, "-m", naming.START_MODULE, "tempflow_trainer.explain")


def explain(
    job: TempFlowGRPOJob, rate: str | None = None, *, command: Sequence[str] = EXPLAINER
) -> Explanation:
    """Ask the trainer, which loads no weights for it.

    Raises the trainer's error, with its exit code.
    """
    arguments = [] if rate is None else [f"--rate={rate}"]
    child = subprocess.run(
        [*command, *arguments],
        input=job.model_dump_json(by_alias=True),
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        raise _error(child.returncode, child.stderr)
    return Explanation.model_validate_json(child.stdout)


def _error(code: int, stderr: str) -> TempFlowError:
    said = [line for line in stderr.splitlines() if line.strip()]
    told = [line for line in said if line.startswith("error: ")]
    message = told[-1].removeprefix("error: ") if told else "\n".join(said[-1:])
    return Refused(message) if code == 2 else of_code(code, message)


def lines(found: Explanation) -> Iterator[str]:
    """For people: what is decided first, then what it costs."""
    groups, geometry = found.groups, found.geometry
    yield f"{found.name}: {found.method} on {found.model}, {found.width} x {found.height} pixels"
    yield (
        f"{_si(found.parameters)} parameters, {_si(found.trained_parameters)} of them trained"
        if found.trained_parameters <= found.parameters
        else f"{_si(found.parameters)} parameters"
    )
    yield ""
    yield "step   sigma      dt   noise  weight"
    for step in found.schedule:
        weight = f"{step.weight:7.3f}" if step.branched else "      -"
        yield f"{step.step:4d} {step.sigma:7.4f} {step.dt:7.4f} {step.noise_std:7.4f} {weight}"
    yield _weights(found)
    yield ""
    yield (
        f"An epoch: {groups.prompts} prompts x {groups.seeds} start noises x {groups.steps} steps "
        f"x {groups.draws} draws, compared by {groups.compared}"
    )
    yield from _costs(found)
    yield ""
    yield (
        f"A process ({geometry.processes} in all): {geometry.groups_most} start noises, "
        f"{geometry.rollout_calls} calls a rollout, {geometry.images} images, "
        f"{geometry.updates} x {geometry.micro_batches_per_update} micro-batches"
    )
    memory = found.memory_bytes
    yield (
        f"  memory {_bytes(memory.total)}: weights "
        f"{_bytes(memory.transformer + memory.text_encoders + memory.autoencoder)}, "
        f"training state "
        f"{_bytes(memory.gradients + memory.optimizer + memory.average + memory.reference)}, "
        f"then rollout {_bytes(memory.rollout)}, scoring {_bytes(memory.scoring)} or update "
        f"{_bytes(memory.update)}; trajectories {_bytes(memory.trajectories)}"
    )
    yield "  not counted: models of rewards, libraries"
    seconds = found.seconds
    if seconds is not None:
        yield (
            f"  seconds an epoch {seconds.total:.3g}: rollout {seconds.rollout:.3g}, decoding "
            f"{seconds.scoring:.3g}, update {seconds.update:.3g}; text encoders and rewards come "
            "on top"
        )


def _weights(found: Explanation) -> str:
    if found.weighting == "none":
        return "weights are 1 at every branch step"
    raw = "noise" if found.weighting == "noise-aware" else "1 / |dt|"
    return f"weights are {raw} x {found.weight_normaliser:.4f}"


def _costs(found: Explanation) -> Iterator[str]:
    count, flops = found.evaluations, found.flops
    yield f"  images scored    {found.images_scored:>14,}"
    yield f"  evaluations      {count.total:>14,}"
    yield f"    trunk          {count.trunk:>14,}"
    yield f"    tails          {count.tails:>14,}"
    yield f"    training       {count.training:>14,}"
    yield f"    reference      {count.reference:>14,}"
    yield f"  as forward passes{count.forward_equivalents:>14,.0f}"
    yield (
        f"  operations {_si(flops.total)}FLOP: rollout {_si(flops.rollout)}, training "
        f"{_si(flops.training)}, reference {_si(flops.reference)}, decoding {_si(flops.decoding)}"
    )


def _si(number: float) -> str:
    for size, sign in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.2f} {sign}"
    return f"{number:.0f} "


def _bytes(number: int) -> str:
    for size, sign in ((2**30, "GiB"), (2**20, "MiB")):
        if number >= size:
            return f"{number / size:.1f} {sign}"
    return f"{number / 2**10:.1f} KiB"
