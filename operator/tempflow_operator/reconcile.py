"""One pass over one job: observe, decide, act, write status, tell. The only orchestration.

Every trigger runs the same pass, and a pass assumes nothing of an earlier one but what the API
server holds: after a crash between any two calls, the next pass continues.
"""

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from tempflow_api.conditions import ConditionType, Reason, is_true
from tempflow_api.status import JobStatus
from tempflow_api.termination import LastWords
from tempflow_operator import desired
from tempflow_operator.cluster import ApiError, Cluster, NameTaken, Observation
from tempflow_operator.decisions import events, instants, ledger, plan, validity
from tempflow_operator.decisions import status as statuses
from tempflow_operator.decisions.ledger import Ledger
from tempflow_operator.decisions.observed import Key, Snapshot, TrainingJob
from tempflow_operator.decisions.plan import Action
from tempflow_operator.decisions.status import Obstacle, Reading
from tempflow_operator.lastwords import Heard
from tempflow_operator.metrics import Metrics
from tempflow_operator.probes import WatchProof
from tempflow_operator.progress import ProgressReader, Target
from tempflow_operator.settings import Settings

logger = logging.getLogger(__name__)


class Obstructed(Exception):
    """What was decided could not be done. Status says so; the pass is to be repeated."""


class Decision(NamedTuple):
    """What a pass is about to do."""

    accounts: Ledger
    """The attempts so far."""
    intended: Ledger
    """The same, or with the next attempt opened, which ``actions`` start."""
    actions: list[Action]


def decide(
    job: TrainingJob,
    seen: Snapshot,
    now: float,
    settings: Settings,
    reading: Reading | None = None,
) -> Decision:
    """The whole decision of a pass, as a function of what was observed and read."""
    problems = validity.problems(job, default_image=settings.pods.image)
    accounts = ledger.bring_up_to_date(job, seen, problems, now, settings.timing, reading)
    intended = plan.next_attempt(accounts, job, seen, now, settings.timing)
    objects: list[desired.Manifest] = []
    if job.spec is not None and intended.open:
        attempt = desired.AttemptOf(
            job=job.name,
            namespace=job.namespace,
            uid=job.uid,
            spec=job.spec,
            number=intended.attempt,
        )
        objects = desired.objects(attempt, settings.pods)
    return Decision(accounts, intended, plan.actions(job, seen, intended, objects, now))


class Reconciler:
    """What a pass needs."""

    def __init__(
        self,
        cluster: Cluster,
        settings: Settings,
        *,
        progress: ProgressReader,
        heard: Heard,
        watches: WatchProof,
        metrics: Metrics,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._cluster = cluster
        self._settings = settings
        self._progress = progress
        self._heard = heard
        self._watches = watches
        self._metrics = metrics
        self._wall_clock = wall_clock
        self._series = events.Series()

    async def run_pass(self, key: Key) -> float | None:
        """Returns after how many seconds to look again at the latest."""
        with self._metrics.passes.time():
            return await self._pass(key)

    async def _pass(self, key: Key) -> float | None:
        found = await self._cluster.observe(key)
        if found is None:
            self._progress.reading(key, None)
            return None
        self._watches.expect(key.namespace, found.newest)
        job, seen, now = found.job, found.seen, self._wall_clock()
        if not job.ours:
            self._progress.reading(key, None)
            return None
        decision = decide(job, seen, now, self._settings, self._progress.last(key))
        obstacle = await self._act(key, decision.actions)
        # What could not be started has not started.
        reached = decision.intended if obstacle is None else decision.accounts
        reading = self._progress.reading(key, rank_zero(job, seen, reached))
        await self._publish(found, reached, reading, obstacle, now)
        if obstacle is not None:
            raise Obstructed(obstacle.message)
        due = plan.look_again_at(job, seen, reached, now, self._settings.timing, reading)
        return None if due is None else max(0.0, due - now)

    async def _act(self, key: Key, actions: list[Action]) -> Obstacle | None:
        for action in actions:
            logger.info("%s: %s %s %s", key, type(action).__name__, action.kind, action.name)
            try:
                await self._cluster.execute(key.namespace, action)
            except NameTaken as taken:
                return Obstacle(Reason.NAME_TAKEN, str(taken))
            except ApiError as error:
                if not error.refused:
                    raise
                return Obstacle(Reason.REQUEST_REFUSED, str(error))
        return None

    async def _publish(
        self,
        found: Observation,
        accounts: Ledger,
        reading: Reading | None,
        obstacle: Obstacle | None,
        now: float,
    ) -> None:
        job, seen = found.job, found.seen
        if job.deleting:
            return
        released = plan.released(accounts, seen, now, self._settings.timing)
        status = statuses.next_status(
            job,
            seen,
            accounts,
            reading=reading,
            words=last_words_of(job, seen, accounts, self._heard.of(job.namespace, job.uid)),
            obstacle=obstacle,
            released=released,
            now=now,
        )
        if statuses.stored_form(status) == job.stored_status:
            return
        try:
            await self._cluster.write_status(job, status)
        except ApiError as error:
            if error.code == 404:  # deleted in this very pass, its time to live being over
                return
            raise
        self._count(job.status, status, now)
        for event in events.between(job.status, status):
            tell = self._series.consider(job.uid, event, now)
            if tell is not None:
                await self._tell(job, tell, now)

    async def _tell(self, job: TrainingJob, tell: events.Tell, now: float) -> None:
        try:
            await self._cluster.tell(job, tell, now, self._settings.lease.identity)
        except ApiError as error:
            # An event repeats what status says; a pass does not fail for it.
            logger.warning("event of %s/%s: %s", job.namespace, job.name, error)

    def _count(self, old: JobStatus, new: JobStatus, now: float) -> None:
        before = {attempt.number: attempt.outcome for attempt in old.attempts}
        for attempt in new.attempts:
            ended = attempt.outcome in ("Failed", "Disrupted", "Unfit")
            if ended and before.get(attempt.number) != attempt.outcome:
                self._metrics.restarts.labels(attempt.outcome).inc()
        running = ConditionType.RUNNING
        began = not is_true(old.conditions, running) and is_true(new.conditions, running)
        if began and new.attempt_started_at is not None:
            from_start = now - instants.seconds(new.attempt_started_at)
            self._metrics.time_to_running.observe(max(0.0, from_start))


def rank_zero(job: TrainingJob, seen: Snapshot, accounts: Ledger) -> Target | None:
    """Whom to ask for progress: the running pod with index 0 of the attempt under way."""
    if not accounts.open:
        return None
    for pod in seen.pods_of(accounts.attempt):
        if pod.rank == 0 and pod.phase == "Running" and pod.ip and not pod.deleting:
            return Target(pod.uid, pod.ip, accounts.attempt, job.run_id)
    return None


def last_words_of(
    job: TrainingJob, seen: Snapshot, accounts: Ledger, heard: LastWords | None
) -> LastWords | None:
    """Of the newest start of the newest attempt: as its pod has them, or else as the watch told of
    them. Those of a start before the one whose progress is known are of no use."""
    told = (pod.ended.words for pod in seen.pods_of(accounts.attempt) if pod.ended is not None)
    ours = (job.run_id, accounts.attempt)
    found = [w for w in (*told, heard) if w is not None and (w.run_id, w.attempt) == ours]
    newest = max(found, key=lambda words: words.start, default=None)
    known = job.status.progress
    if newest is not None and known is not None and newest.start < known.start:
        return None
    return newest
