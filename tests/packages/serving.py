"""A package's own answers, and those of our server where the package is installed."""

import json
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tempflow_trainer.score import read_picture
from tests.packages import environment
from tests.unit.trainer.reward_servers import remote

START_SECONDS = 180
LONG = "a {red} dog " + "of many words " * 60
ASKED = (
    # Larger and smaller than what the models take, wide and high; the second makes a batch ragged.
    ((96, 64), "A red dog, 3 cats"),
    ((96, 64), LONG),
    ((60, 200), "three cats"),
    ((640, 480), "x"),
)


def ask(folder: Path) -> list[tuple[str, str]]:
    """Files of random pictures, each with a prompt."""
    random = np.random.default_rng(0)
    asked = []
    for number, ((width, height), prompt) in enumerate(ASKED):
        blocks = random.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        file = str(folder / f"{number}.png")
        Image.fromarray(blocks.repeat(4, 0).repeat(4, 1)).save(file)
        asked.append((file, prompt))
    (folder / "asked.json").write_text(json.dumps(asked))
    return asked


def package_says(name: str, script: str, folder: Path, *words: Path) -> dict[str, Tensor]:
    """What ``script``, which runs where the package is, leaves for ``asked.json``; it makes the
    model first."""
    answers = folder / "answers.safetensors"
    given = (
        Path(__file__).with_name(script),
        folder / "hub",
        *words,
        folder / "asked.json",
        answers,
    )
    done = subprocess.run(
        [str(word) for word in (environment.python(name), *given)],
        env=environment.variables(folder / "hub"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return load_file(answers)


@contextmanager
def served(name: str, folder: Path, *options: str) -> Iterator[str]:
    """The address of the server of a reward, as its image starts it."""
    command = [str(environment.python(name)), "-m", "tempflow_trainer.rewards.serve", name]
    log = folder / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--port=0", f"--cache={folder}", *options],
            env=environment.variables(folder / "hub"),
            stdout=output,
            stderr=output,
            cwd=folder,
        )
        try:
            yield _address(server, log)
        finally:
            server.terminate()
            server.wait(30)


def _address(server: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if found := re.search(r"serves \S+ at (http://\S+)", log.read_text()):
            return found[1]
        try:
            server.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
        break
    raise AssertionError(f"the server does not serve: {log.read_text()[-4000:]}")


def scores(name: str, url: str, asked: Sequence[tuple[str, str]]) -> Tensor:
    """What a run is told, [N], nan where there is no score; pictures of one size are a batch."""
    reward = remote(url, name=name, timeoutSeconds=60, deadlineSeconds=60)
    pictures = [read_picture(Path(file)) for file, _ in asked]
    by_size: dict[torch.Size, list[int]] = {}
    for index, picture in enumerate(pictures):
        by_size.setdefault(picture.shape, []).append(index)
    found = torch.empty(len(asked))
    for rows in by_size.values():
        images, prompts = torch.stack([pictures[i] for i in rows]), [asked[i][1] for i in rows]
        found[rows] = reward.score(images, prompts, [{} for _ in rows])[name]
    return found


def clip_pixels(picture: Image.Image) -> Tensor:
    """[3, H, W], as CLIP's mean and spread make it."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    spread = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return (pixels / 255 - mean) / spread
