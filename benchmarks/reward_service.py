"""Throughput of a served reward against the same one in process, and many clients at once.

    OMP_NUM_THREADS=1 PYTHONPATH=sdk:trainer:. python -m benchmarks.reward_service

Cheap: a mean over the pixels. Expensive: the same, with a number of milliseconds an image for a
model on another device. The load test has more clients than the queue has room for.
"""

import argparse
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil
import torch
from torch import Tensor

from benchmarks.reward_server import serving
from tempflow_api.v1alpha1 import RewardService, RewardTerm
from tempflow_trainer.rewards import registry
from tempflow_trainer.rewards.base import Reward

REWARD = "benchmarks.sleeping_reward:Sleeping"


def noise(count: int, side: int) -> Tensor:
    """Pictures that do not compress: the worst case for the wire."""
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=random)


def score(reward: Reward, images: Tensor) -> Tensor:
    count = len(images)
    [scores] = reward.score(images, ["a"] * count, [{}] * count).values()
    return scores


def served(url: str, **settings: object) -> Reward:
    service = RewardService.model_validate({"endpoints": [url], **settings})
    return registry.build([RewardTerm(name="served", uses=REWARD, service=service)])


def rate(work: Callable[[], object], images: int) -> float:
    """Images a second, the best of three: other work on the machine only slows."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return images / min(seconds)


def throughput(side: int, milliseconds: float, count: int) -> None:
    images = noise(count, side)
    parameters = {"seconds_per_image": repr(milliseconds / 1000)}
    here = registry.build([RewardTerm(name="here", uses=REWARD, parameters=parameters)])
    with serving(REWARD, "--set", f"seconds_per_image={milliseconds / 1000!r}") as (url, _):
        for image_format in ("png", "webp"):
            away = served(url, imageFormat=image_format)
            assert torch.equal(score(away, images), score(here, images))
            inside = rate(lambda: score(here, images), count)
            outside = rate(lambda away=away: score(away, images), count)  # type: ignore[misc]
            print(
                f"{side} px, {milliseconds:g} ms an image, {image_format}: in process "
                f"{inside:.0f}/s, served {outside:.0f}/s, ratio {outside / inside:.2f}"
            )


def load(clients: int, requests: int, side: int) -> None:
    """Every client asks again and again; each answer is compared with what it must be."""
    images = noise(64, side)
    parts = images.split(8)
    expected = [score(registry.build([RewardTerm(name="x", uses=REWARD)]), p) for p in parts]
    with serving(
        REWARD, "--set", "seconds_per_image=0.001", "--queue-images", "64", "--max-requests", "16"
    ) as (url, pid):
        process = psutil.Process(pid)
        rest, peak, ended = process.memory_info().rss, [0], threading.Event()

        def watch() -> None:
            while not ended.wait(0.05):
                peak[0] = max(peak[0], process.memory_info().rss)

        threading.Thread(target=watch).start()

        def client(number: int) -> int:
            away, right = served(url, deadlineSeconds=300.0), 0
            for turn in range(requests):
                part = (number + turn) % len(parts)
                right += int(torch.equal(score(away, parts[part]), expected[part]))
            return right

        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            right = sum(pool.map(client, range(clients)))
        seconds = time.perf_counter() - start
        ended.set()
    total = clients * requests
    print(
        f"{clients} clients, {total} requests of 8 pictures of {side} px in {seconds:.1f} s: "
        f"{right} right, {total - right} lost or wrong; server {rest / 2**20:.0f} MiB at rest, "
        f"{peak[0] / 2**20:.0f} MiB at most"
    )
    assert right == total


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--clients", type=int, default=48)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for milliseconds in (0.0, 20.0):
        throughput(arguments.side, milliseconds, arguments.images)
    load(arguments.clients, 8, arguments.side)


if __name__ == "__main__":
    main()
