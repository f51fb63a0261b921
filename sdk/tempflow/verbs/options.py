"""Options that several verbs have, spelled and explained alike, and what they are turned into."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tempflow_api.errors import ExitCode, TempFlowError

if TYPE_CHECKING:
    from rich.console import Console

    from tempflow.checkpoints import Step, Store
    from tempflow.cluster.client import Client

Place = tuple[str | None, str | None, str | None]
"""Kubeconfig, context and namespace."""
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Override a field, for instance spec.algorithm.epochs=5. Repeatable.",
    ),
]
TextOrJson = Annotated[
    Literal["text", "json"], typer.Option("--output", "-o", help="Form of the result on stdout.")
]
Form = Annotated[
    Literal["text", "json", "yaml", "name"],
    typer.Option("--output", "-o", help="Form of the result on stdout."),
]
EndpointUrl = Annotated[
    str | None,
    typer.Option("--endpoint-url", metavar="URL", help="Address of a store other than Amazon's."),
]

Profile = Annotated[
    str | None,
    typer.Option("--profile", metavar="NAME", help="Of the AWS configuration; default its own."),
]

ViaCluster = Annotated[
    bool,
    typer.Option(
        "--via-cluster", help="Of job/NAME: read by a pod in the cluster, where the store may be."
    ),
]
Image = Annotated[
    str | None,
    typer.Option("--image", metavar="IMAGE", help="Of that pod; default the job's own."),
]


@dataclass(frozen=True)
class From:
    """Where a stored run is read from, as the command line says it."""

    uri: str
    endpoint_url: str | None
    profile: str | None
    cluster: Place
    via_cluster: bool = False
    image: str | None = None

    def check(self) -> None:
        """Refuse what does not fit together."""
        if not self.via_cluster:
            if self.image is not None:
                raise typer.BadParameter("--image is that of the pod of --via-cluster: add it")
            return
        if not self.uri.startswith(JOB_PREFIX):
            raise typer.BadParameter(f"got {self.uri}: with --via-cluster expects job/NAME")
        if self.endpoint_url or self.profile:
            raise typer.BadParameter(
                "--endpoint-url and --profile are for a store that is read from here: leave them "
                "out with --via-cluster, where the job says both"
            )


def names_of_jobs(context: typer.Context, incomplete: str) -> list[str]:
    """For a shell that completes; where the cluster does not answer, there is nothing to offer."""
    given = context.params
    try:
        with client(given.get("kubeconfig"), given.get("context"), given.get("namespace")) as jobs:
            names = [job.name for job in jobs.list()]
    except TempFlowError:
        return []
    return [name for name in names if name.startswith(incomplete)]


JobName = Annotated[
    str, typer.Argument(metavar="JOB", help="Its name.", autocompletion=names_of_jobs)
]
JobNames = Annotated[
    list[str], typer.Argument(metavar="JOB...", help="Names.", autocompletion=names_of_jobs)
]
Namespace = Annotated[
    str | None,
    typer.Option("--namespace", "-n", metavar="NAME", help="Default: that of the context."),
]
Context = Annotated[
    str | None,
    typer.Option("--context", metavar="NAME", help="Of the kubeconfig; default the current one."),
]
Kubeconfig = Annotated[
    str | None,
    typer.Option("--kubeconfig", metavar="FILE", help="Default $KUBECONFIG or ~/.kube/config."),
]
Timeout = Annotated[
    str | None,
    typer.Option("--timeout", metavar="TIME", help="Give up after it: 30s, 10m, 2h. Exit code 61."),
]

JOB_PREFIX = "job/"
_UNITS = {"s": 1, "m": 60, "h": 3600}


def client(kubeconfig: str | None, context: str | None, namespace: str | None) -> "Client":
    """Asks the cluster nothing yet."""
    from tempflow.cluster.client import Client

    return Client(kubeconfig=kubeconfig, context=context, namespace=namespace)


def open_run(uri: str, endpoint_url: str | None, profile: str | None, cluster: Place) -> "Store":
    """The stored run at an address, or of ``job/NAME``."""
    from tempflow import checkpoints

    return checkpoints.open_store(*_stored_at(uri, endpoint_url, cluster), profile)


def open_checkpoint(
    uri: str, step: int | None, endpoint_url: str | None, profile: str | None, cluster: Place
) -> "tuple[Store, Step]":
    """A checkpoint of the run at an address, the one whose folder that is, or of ``job/NAME``."""
    from tempflow import checkpoints

    address, endpoint, region = _stored_at(uri, endpoint_url, cluster)
    return checkpoints.find(address, step, endpoint, region, profile)


@contextmanager
def run_of(source: From) -> "Iterator[Store]":
    """The stored run, to be read only."""
    source.check()
    if not source.via_cluster:
        yield open_run(source.uri, source.endpoint_url, source.profile, source.cluster)
        return
    name = source.uri.removeprefix(JOB_PREFIX)
    with (
        client(*source.cluster) as asked,
        asked.store_inside(name, image=source.image, on_start=_tell_pod) as store,
    ):
        yield store


def _tell_pod(name: str) -> None:
    typer.echo(f"reads through pod {name}", err=True)


@contextmanager
def checkpoint_of(source: From, step: int | None) -> "Iterator[tuple[Store, Step]]":
    """A checkpoint of that run, to be read only."""
    from tempflow import checkpoints

    if not source.via_cluster:
        source.check()
        yield open_checkpoint(source.uri, step, source.endpoint_url, source.profile, source.cluster)
        return
    with run_of(source) as store:
        yield store, checkpoints.choose(store, step)


def _stored_at(
    uri: str, endpoint_url: str | None, cluster: Place
) -> tuple[str, str | None, str | None]:
    """Address, endpoint and region; ``job/NAME`` is asked of the cluster."""
    if not uri.startswith(JOB_PREFIX):
        return uri, endpoint_url, None
    with client(*cluster) as asked:
        address, endpoint, region = asked.store_of(uri.removeprefix(JOB_PREFIX))
    return address, endpoint_url or endpoint, region


def seconds(text: str | None) -> float | None:
    """``90``, ``90s``, ``10m`` or ``2h``."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None:
        raise typer.BadParameter(f"got {text}: expects for instance 30s, 10m or 2h")
    return float(match.group(1)) * _UNITS[match.group(2) or "s"]


def console(*, stderr: bool) -> "Console":
    """Where text for people goes."""
    from rich.console import Console

    return Console(stderr=stderr)


@contextmanager
def jobs_go_on(*names: str) -> Iterator[None]:
    """Ctrl-C ends the looking on, not the job, and says so."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(
            f"\n{', '.join(names)}: not stopped by this; 'tempflow status {names[0]}' looks on, "
            f"'tempflow cancel {names[0]}' stops it",
            err=True,
        )
        raise typer.Exit(ExitCode.INTERRUPTED) from None
