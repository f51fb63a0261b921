"""Draw images with a trained model: the trainer's sampler as a child process."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tempflow.refused import Refused
from tempflow_api import naming

SAMPLER = (sys.executable, "-m", naming.START_MODULE, "tempflow_trainer.sample")


def sample(
    source: Path,
    prompts: Sequence[str],
    *,
    count: int,
    seed: int,
    out: Path,
    base: bool,
    device: str | None = None,
    command: Sequence[str] = SAMPLER,
) -> int:
    """Draw ``count`` images a prompt into the picture ``out``; the sampler's exit code.

    ``source`` is the folder of a run, of a checkpoint or of a result. With ``base`` the model as
    it was before training draws from the same noise; ``device`` replaces that of the run.
    """
    if source.parts[:1] == ("s3:",):  # a path has lost one of the slashes
        uri = f"s3://{'/'.join(source.parts[1:])}"
        raise Refused(f"{uri} is not on this machine: 'tempflow pull {uri}' first, then its folder")
    if not source.is_dir():
        raise Refused(f"there is no folder {source}: expects that of a run, checkpoint or result")
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise Refused(f"cannot write the picture {out}: its folder must exist")
    # As one word each: a prompt may begin with a dash.
    arguments = [f"--from={source}", *(f"--prompt={prompt}" for prompt in prompts)]
    arguments += [f"--count={count}", f"--seed={seed}", f"--out={out}"]
    arguments += [*(["--base"] if base else []), *([f"--device={device}"] if device else [])]
    return subprocess.run([*command, *arguments], check=False).returncode
