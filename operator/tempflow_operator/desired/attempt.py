"""One attempt of a job, and what all its objects have in common."""

from dataclasses import dataclass
from typing import Any

from tempflow_api.naming import (
    API_VERSION,
    FIELD_MANAGER,
    KIND,
    LABEL_ATTEMPT,
    LABEL_JOB_NAME,
    LABEL_JOB_UID,
    LABEL_REWARD,
    LABEL_ROLE,
    ROLE_REWARD,
    ROLE_TRAINER,
    attempt_name,
)
from tempflow_api.v1alpha1 import JobSpec

Manifest = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class AttemptOf:
    """Which job, and its how-manieth attempt, from 1."""

    job: str
    namespace: str
    uid: str
    spec: JobSpec
    number: int

    @property
    def name(self) -> str:
        return attempt_name(self.job, self.number)

    @property
    def config_name(self) -> str:
        """Name of the ConfigMap. It is no other job's, not even that of an earlier job of the same
        name which is just being collected: pods must not start with what that one left."""
        return f"{self.name}-{self.uid[:8]}"

    def selector(self) -> dict[str, str]:
        """Labels that exactly this attempt's pods have, ranks and reward servers."""
        return {LABEL_JOB_UID: self.uid, LABEL_ATTEMPT: str(self.number)}

    def ranks(self) -> dict[str, str]:
        """Labels that exactly the pods of its ranks have."""
        return {**self.selector(), LABEL_ROLE: ROLE_TRAINER}

    def servers_of(self, reward: str) -> dict[str, str]:
        """Labels that exactly the pods that serve a reward have."""
        return {**self.selector(), LABEL_ROLE: ROLE_REWARD, LABEL_REWARD: reward}

    def labels(self, reward: str | None = None) -> dict[str, str]:
        """Of the attempt's objects, or of those that serve a reward."""
        selector = self.ranks() if reward is None else self.servers_of(reward)
        return {
            "app.kubernetes.io/name": "tempflow",
            "app.kubernetes.io/instance": self.job,
            "app.kubernetes.io/component": selector[LABEL_ROLE],
            "app.kubernetes.io/part-of": "tempflow",
            "app.kubernetes.io/managed-by": FIELD_MANAGER,
            LABEL_JOB_NAME: self.job,
            **selector,
        }

    def metadata(self) -> Manifest:
        """Name, labels, and the job as controller: with the job the garbage collector takes all."""
        owner = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": self.job,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }
        return {
            "name": self.name,
            "namespace": self.namespace,
            "labels": self.labels(),
            "ownerReferences": [owner],
        }
