"""What the operator adds to the control plane, with 1, 100 and 500 jobs of eight pods.

    PYTHONPATH=sdk:operator:trainer:. python -m benchmarks.operator --jobs 1,100,500

The limit are the same Indexed Jobs, created without operator: same pods, no Service, no ConfigMap,
nobody who watches. Both take turns. KWOK plays the nodes; all else is real. The first run builds
Kubernetes, if the cluster tests have not done so, and KWOK. Needs root, for a network of its own.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import kwok_cluster
from benchmarks.observer import NAMESPACE, Observer, Raw
from benchmarks.operator_process import OperatorProcess
from benchmarks.rank_zero import EPOCHS, RanksZero
from tempflow_api import naming
from tempflow_operator import desired
from tempflow_operator.cluster import JOBS, PODS, TRAINING_JOBS
from tempflow_operator.settings import Pods
from tests.builders import make_job
from tests.cluster.bare import Bare
from tests.cluster.waiting import Say, progress_lines

PODS_A_JOB = 8
START_SECONDS = 900
STEADY_SECONDS = 45.0
CHURN_SECONDS = 45.0
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Started:
    """From the first request to the last pod that runs."""

    seconds: float
    resident_bytes: int = 0
    """Of the operator, before the first request."""
    cpu_seconds: float = 0
    requests: float = 0
    lags: tuple[float, ...] = ()
    """By job: from its last pod that runs to the status that says so, in seconds."""


@dataclass(frozen=True)
class Load:
    """The operator while all jobs run."""

    pod_events_a_second: float
    """As many as came about."""
    cpu: float
    """Cores in use."""
    requests_a_second: float
    lags: tuple[float, ...]
    """From a change of a job's spec to the status that knows it, in seconds."""


def training_job(name: str) -> Raw:
    job = make_job(name).nodes(PODS_A_JOB).spec("algorithm.epochs", EPOCHS).build()
    return {
        "apiVersion": job["apiVersion"],
        "kind": job["kind"],
        "metadata": {"name": name},
        "spec": job["spec"],
    }


def indexed_job(name: str) -> Raw:
    """What the operator would create for it, without an owner."""
    spec = make_job(name).nodes(PODS_A_JOB).spec("algorithm.epochs", EPOCHS).spec_only()
    attempt = desired.AttemptOf(job=name, namespace=NAMESPACE, uid="none", spec=spec, number=1)
    (job,) = (one for one in desired.objects(attempt, Pods()) if one["kind"] == "Job")
    metadata = {key: job["metadata"][key] for key in ("name", "namespace", "labels")}
    return {**job, "metadata": metadata}


def gang_of(pod: str) -> str:
    """``job-0-a1-3-x7k2p`` is a pod of ``job-0-a1``."""
    return pod.rsplit("-", 2)[0]


async def start_plain(observer: Observer, jobs: int) -> Started:
    started = time.monotonic()
    await observer.create(JOBS, [indexed_job(f"job-{number}") for number in range(jobs)])
    await all_run(observer, jobs)
    return Started(max(observer.pods_running.values()) - started)


async def start_ours(observer: Observer, operator: OperatorProcess, jobs: int) -> Started:
    resident, cpu, requests = (
        operator.resident_bytes(),
        operator.cpu_seconds(),
        await asyncio.to_thread(operator.requests),
    )
    started = time.monotonic()
    await observer.create(TRAINING_JOBS, [training_job(f"job-{number}") for number in range(jobs)])
    await all_run(observer, jobs, operator.runs)
    await observer.until(
        "a status that says Running, of every job",
        lambda: operator.runs() and len(observer.said_running) == jobs,
        deadline_seconds=START_SECONDS,
    )
    last: dict[str, float] = {}
    for pod, moment in observer.pods_running.items():
        last[gang_of(pod)] = max(moment, last.get(gang_of(pod), 0.0))
    return Started(
        max(observer.pods_running.values()) - started,
        resident,
        operator.cpu_seconds() - cpu,
        await asyncio.to_thread(operator.requests) - requests,
        tuple(
            max(0.0, said - last[naming.attempt_name(job, 1)])
            for job, said in observer.said_running.items()
        ),
    )


async def all_run(
    observer: Observer, jobs: int, healthy: Callable[[], bool] = lambda: True
) -> None:
    await observer.until(
        f"{jobs * PODS_A_JOB} pods that run",
        lambda: healthy() and len(observer.pods_running) == jobs * PODS_A_JOB,
        deadline_seconds=START_SECONDS,
    )


async def under_load(
    observer: Observer, operator: OperatorProcess, seconds: float, pod_events_a_second: float
) -> Load:
    """Spec changes of one job after the other, beside pods that change."""
    cpu, requests = operator.cpu_seconds(), await asyncio.to_thread(operator.requests)
    started = time.monotonic()
    changed: list[str] = []
    changes = asyncio.create_task(change_pods(observer, pod_events_a_second, changed))
    try:
        lags = await spec_lags(observer, started + seconds)
    finally:
        changes.cancel()
        ended = await asyncio.gather(changes, return_exceptions=True)
    for outcome in ended:
        if isinstance(outcome, Exception):
            raise outcome
    took = time.monotonic() - started
    return Load(
        len(changed) / took,
        (operator.cpu_seconds() - cpu) / took,
        (await asyncio.to_thread(operator.requests) - requests) / took,
        tuple(lags),
    )


async def spec_lags(observer: Observer, until: float) -> list[float]:
    """Twice a second, a field that changes nothing else; all answers are waited for."""
    chance, waiting = random.Random(0), []
    names = sorted(observer.said_running)
    restarts = 4
    while time.monotonic() < until:
        restarts = 4 + restarts % 900
        waiting.append(asyncio.create_task(spec_lag(observer, chance.choice(names), restarts)))
        await asyncio.sleep(0.5)
    return [await lag for lag in waiting]


async def spec_lag(observer: Observer, job: str, restarts: int) -> float:
    body = {"spec": {"runPolicy": {"maxRestarts": restarts}}}
    generation = (await observer.change(TRAINING_JOBS, job, body))["metadata"]["generation"]
    changed = time.monotonic()
    known = observer.generations[job]
    await observer.until(
        f"generation {generation} in the status of {job}",
        lambda: max(known) >= generation,
        deadline_seconds=120,
    )
    return max(0.0, min(at for number, at in known.items() if number >= generation) - changed)


async def change_pods(observer: Observer, events_a_second: float, changed: list[str]) -> None:
    """Pods that stop running and run again, so that every event changes what status has to say;
    fewer when the API server cannot take so many. ``changed`` gets the pod of each event."""
    if not events_a_second:
        return
    chance, pods, away = random.Random(1), sorted(observer.pods_running), set[str]()
    started, writers = time.monotonic(), 8

    async def write() -> None:
        while True:
            pod = chance.choice(pods)
            away.symmetric_difference_update({pod})
            status = {"status": {"phase": "Pending" if pod in away else "Running"}}
            await observer.change(PODS, f"{pod}/status", status)
            changed.append(pod)
            due = started + len(changed) / events_a_second
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async with asyncio.TaskGroup() as group:
        for _ in range(writers):
            group.create_task(write())


async def serve_progress(observer: Observer, ranks: RanksZero) -> None:
    for pod, address in observer.addresses.items():
        gang, index, _ = pod.rsplit("-", 2)
        if index == "0":
            job = gang.removesuffix("-a1")
            await ranks.serve(address, naming.run_folder(NAMESPACE, job, observer.uids[job]))


@contextmanager
def operating(server: Bare) -> Iterator[OperatorProcess]:
    operator = OperatorProcess(server)
    try:
        yield operator
    finally:
        operator.stop()


class Benchmark:
    def __init__(self, server: Bare, say: Say, churn: float) -> None:
        self._server = server
        self._say = say
        self._churn = churn

    async def starts(self, jobs: int, rounds: int) -> None:
        """Time to run, beside the limit."""
        plain, ours = [], []
        for number in range(rounds):
            plain.append(await self._fresh(partial(start_plain, jobs=jobs)))
            self._say(f"{jobs} jobs, round {number + 1}: plain {plain[-1].seconds:.2f} s")
            with operating(self._server) as operator:
                await asyncio.to_thread(operator.wait_leading)
                # An operator is started once for many jobs, and the first costs it more.
                await self._fresh(partial(start_ours, operator=operator, jobs=1))
                ours.append(await self._fresh(partial(start_ours, operator=operator, jobs=jobs)))
                self._tell_start(jobs, ours[-1], operator)
        limit = statistics.median(one.seconds for one in plain)
        took = statistics.median(one.seconds for one in ours)
        self._say(
            f"{jobs} jobs: plain {limit:.2f} s, operator {took:.2f} s, ratio {took / limit:.3f} "
            f"(medians of {rounds})"
        )

    def _tell_start(self, jobs: int, one: Started, operator: OperatorProcess) -> None:
        self._say(
            f"{jobs} jobs: operator {one.seconds:.2f} s; status after the last pod: "
            f"{spread(one.lags)}; {one.cpu_seconds:.1f} s processor, "
            f"{one.requests / jobs:.1f} requests a job; memory {one.resident_bytes / MEBIBYTE:.0f} "
            f"MiB before, {operator.peak_bytes / MEBIBYTE:.0f} MiB at most"
        )

    async def _fresh(self, part: Callable[[Observer], Coroutine[Any, Any, Started]]) -> Started:
        """On an empty cluster, which is empty afterwards."""
        async with Observer(self._server) as observer:
            try:
                return await part(observer)
            finally:
                await observer.clear()

    async def steady(self, jobs: int) -> None:
        """All jobs run: progress is read, then pods change, then the operator starts anew."""
        ranks = RanksZero()
        await ranks.start()
        async with Observer(self._server) as observer:
            try:
                with operating(self._server) as operator:
                    await asyncio.to_thread(operator.wait_leading)
                    await start_ours(observer, operator, jobs)
                    await serve_progress(observer, ranks)
                    for events, seconds in ((0.0, STEADY_SECONDS), (self._churn, CHURN_SECONDS)):
                        load = await under_load(observer, operator, seconds, events)
                        self._tell_load(jobs, load, operator)
                with operating(self._server) as operator:
                    seconds = await asyncio.to_thread(operator.wait_consistent, jobs)
                    self._say(
                        f"{jobs} jobs: cold start, every job looked at after {seconds:.1f} s; "
                        f"{operator.peak_bytes / MEBIBYTE:.0f} MiB at most"
                    )
            finally:
                await observer.clear()
                await ranks.stop()

    def _tell_load(self, jobs: int, load: Load, operator: OperatorProcess) -> None:
        self._say(
            f"{jobs} jobs run, {load.pod_events_a_second:.0f} pod events a second: "
            f"{load.cpu:.2f} cores, "
            f"{load.requests_a_second:.0f} requests a second, status after a change: "
            f"{spread(load.lags)}; memory {operator.resident_bytes() / MEBIBYTE:.0f} MiB, "
            f"{operator.peak_bytes / MEBIBYTE:.0f} MiB at most"
        )


def spread(values: Sequence[float]) -> str:
    ordered = sorted(values)
    at = {share: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.99)}
    return f"median {at[0.5]:.2f} s, p99 {at[0.99]:.2f} s, most {ordered[-1]:.2f} s"


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--jobs", default="1,100,500", help="counts, separated by commas")
    parser.add_argument("--rounds", type=int, default=3, help="of the starts")
    parser.add_argument("--churn", type=float, default=200, help="pod events a second")
    parser.add_argument("--only", choices=("starts", "steady"), help="one of the two parts")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.jobs.split(",")]
    say = progress_lines()
    say(kwok_cluster.machine())
    with (
        tempfile.TemporaryDirectory(prefix="tempflow-benchmark-") as folder,
        kwok_cluster.running(Path(folder), say) as server,
    ):
        benchmark = Benchmark(server, say, arguments.churn)
        for jobs in counts:
            if arguments.only != "steady":
                asyncio.run(benchmark.starts(jobs, arguments.rounds))
            if arguments.only != "starts":
                asyncio.run(benchmark.steady(jobs))


if __name__ == "__main__":
    main()
