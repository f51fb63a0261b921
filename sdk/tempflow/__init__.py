"""Write, check and run TempFlow-GRPO jobs: the Python SDK and the command line.

``Client`` submits jobs to a cluster and looks after them; ``read`` turns YAML into a typed job.
``local`` runs a job on this machine, ``checkpoints`` lists and pulls what a run has stored,
``render`` shows it. Nothing here needs torch.

The names below are the public ones. They are loaded when they are first used: the command line's
help needs none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tempflow.cluster.client import Client
    from tempflow.cluster.errors import (
        ClusterError,
        Conflict,
        Forbidden,
        Invalid,
        JobFailed,
        NotFound,
        NotInstalled,
        Unauthorized,
        Unreachable,
        WaitTimeout,
    )
    from tempflow.cluster.job import Event, Job, JobEvent, LogLine
    from tempflow.manifest import Manifest, read
    from tempflow_api.errors import ExitCode, ManifestInvalid, TempFlowError
    from tempflow_api.v1alpha1 import JobSpec, TempFlowGRPOJob

__all__ = [
    "Client",
    "ClusterError",
    "Conflict",
    "Event",
    "ExitCode",
    "Forbidden",
    "Invalid",
    "Job",
    "JobEvent",
    "JobFailed",
    "JobSpec",
    "LogLine",
    "Manifest",
    "ManifestInvalid",
    "NotFound",
    "NotInstalled",
    "TempFlowError",
    "TempFlowGRPOJob",
    "Unauthorized",
    "Unreachable",
    "WaitTimeout",
    "read",
]

_HOMES = {
    "tempflow.cluster.client": ("Client",),
    "tempflow.cluster.errors": (
        *("ClusterError", "Conflict", "Forbidden", "Invalid", "JobFailed", "NotFound"),
        *("NotInstalled", "Unauthorized", "Unreachable", "WaitTimeout"),
    ),
    "tempflow.cluster.job": ("Event", "Job", "JobEvent", "LogLine"),
    "tempflow.manifest": ("Manifest", "read"),
    "tempflow_api.errors": ("ExitCode", "ManifestInvalid", "TempFlowError"),
    "tempflow_api.v1alpha1": ("JobSpec", "TempFlowGRPOJob"),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
