"""``tempflow wait``, ``suspend``, ``resume``, ``cancel`` and ``delete``."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tempflow.verbs.options import (
    Context,
    Form,
    JobNames,
    Kubeconfig,
    Namespace,
    Timeout,
    client,
    console,
    jobs_go_on,
    seconds,
)
from tempflow_api.errors import ExitCode

if TYPE_CHECKING:
    from tempflow.cluster.job import Job

app = typer.Typer(rich_markup_mode=None)


@app.command()
def wait(
    jobs: JobNames,
    until: Annotated[
        str, typer.Option("--for", metavar="CONDITION", help="Finished, Running, Suspended, ...")
    ] = "Finished",
    timeout: Timeout = None,
    output: Form = "text",
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Wait until jobs have ended, or until another condition is true.

    Exit code 0 when all came to it, 60 when one failed instead, 61 after --timeout.

    \b
    Examples:
      tempflow wait digits
      tempflow wait digits --for Running --timeout 10m
      tempflow wait $(tempflow list -o name)
      tempflow wait digits -o json | jq .status.checkpoint.uri
    """
    from tempflow.cluster import showing
    from tempflow.cluster.errors import JobFailed
    from tempflow_api.conditions import ConditionType

    if until not in set(ConditionType):
        known = ", ".join(ConditionType)
        raise typer.BadParameter(f"got {until}: expects one of {known}", param_hint="--for")
    limit, failed, screen = seconds(timeout), False, console(stderr=output != "text")
    with client(kubeconfig, context, namespace) as cluster, _telling(output, jobs) as tell:
        for job in jobs:
            try:
                with jobs_go_on(job), showing.look(screen, plain=False) as look:
                    done = cluster.wait(
                        job, until=until, timeout_seconds=limit, on_change=look.show
                    )
                tell(done, f"{job}: {until} ({done.why})")
            except JobFailed as error:
                failed = True
                typer.echo(f"error: {error}", err=True)
    if failed:
        raise typer.Exit(ExitCode.JOB_FAILED)


@app.command()
def suspend(
    jobs: JobNames,
    output: Form = "text",
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Stop jobs after a checkpoint; they hold nothing until they are resumed.

    \b
    Examples:
      tempflow suspend digits
      tempflow wait digits --for Suspended
    """
    with client(kubeconfig, context, namespace) as cluster, _telling(output, jobs) as tell:
        for job in jobs:
            tell(cluster.suspend(job), f"{job}: to be suspended; 'tempflow resume {job}' goes on")


@app.command()
def resume(
    jobs: JobNames,
    output: Form = "text",
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Go on with suspended jobs, from their newest checkpoint.

    \b
    Examples:
      tempflow resume digits
    """
    with client(kubeconfig, context, namespace) as cluster, _telling(output, jobs) as tell:
        for job in jobs:
            tell(cluster.resume(job), f"{job}: resumed")


@app.command()
def cancel(
    jobs: JobNames,
    output: Form = "text",
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Stop jobs after a checkpoint, for good. They, their logs and checkpoints stay.

    \b
    Examples:
      tempflow cancel digits
    """
    with client(kubeconfig, context, namespace) as cluster, _telling(output, jobs) as tell:
        for job in jobs:
            removal = f"its checkpoints stay, 'tempflow delete {job}' removes it"
            tell(cluster.cancel(job), f"{job}: cancelled; {removal}")


@app.command()
def delete(
    jobs: JobNames,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Return before its pods are gone.")
    ] = False,
    timeout: Timeout = None,
    output: Annotated[
        Literal["text", "name"],
        typer.Option("--output", "-o", help="Form of the result on stdout."),
    ] = "text",
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Delete jobs with their pods. Checkpoints in the store stay.

    \b
    Examples:
      tempflow delete digits
      tempflow delete digits --no-wait
    """
    limit = seconds(timeout)
    with client(kubeconfig, context, namespace) as cluster:
        for job in jobs:
            cluster.delete(job, wait=not no_wait, timeout_seconds=limit)
            told = f"{job}: {'to be deleted' if no_wait else 'deleted'}"
            typer.echo(told if output == "text" else job)


@contextmanager
def _telling(output: str, names: Sequence[str]) -> "Iterator[Callable[[Job, str], None]]":
    """Takes each job as it comes, with a line about it: for people the line is shown at once, for
    programs all objects at the end, also those before an error."""
    from tempflow.cluster import showing

    came: list[Job] = []

    def tell(job: "Job", line: str) -> None:
        if output == "text":
            typer.echo(line)
        came.append(job)

    try:
        yield tell
    finally:
        if output != "text" and came:
            typer.echo(showing.objects(output, came, several=len(names) > 1))
