"""``tempflow wait``, ``suspend``, ``resume``, ``cancel`` and ``delete``."""

from typing import Annotated

import typer

from tempflow.verbs.options import (
    Context,
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

app = typer.Typer(rich_markup_mode=None)


@app.command()
def wait(
    jobs: JobNames,
    until: Annotated[
        str, typer.Option("--for", metavar="CONDITION", help="Finished, Running, Suspended, ...")
    ] = "Finished",
    timeout: Timeout = None,
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
    """
    from tempflow.cluster import showing
    from tempflow.cluster.errors import JobFailed
    from tempflow.render import say
    from tempflow_api.conditions import ConditionType

    if until not in set(ConditionType):
        known = ", ".join(ConditionType)
        raise typer.BadParameter(f"got {until}: expects one of {known}", param_hint="--for")
    limit, failed, screen = seconds(timeout), False, console(stderr=False)
    with client(kubeconfig, context, namespace) as cluster:
        for job in jobs:
            try:
                with jobs_go_on(job), showing.look(screen, plain=False) as look:
                    done = cluster.wait(
                        job, until=until, timeout_seconds=limit, on_change=look.show
                    )
                say(screen, f"{job}: {until} ({done.why})")
            except JobFailed as error:
                failed = True
                typer.echo(f"error: {error}", err=True)
    if failed:
        raise typer.Exit(ExitCode.JOB_FAILED)


@app.command()
def suspend(
    jobs: JobNames,
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
    with client(kubeconfig, context, namespace) as cluster:
        for job in jobs:
            cluster.suspend(job)
            typer.echo(f"{job}: to be suspended; 'tempflow resume {job}' goes on")


@app.command()
def resume(
    jobs: JobNames,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Go on with suspended jobs, from their newest checkpoint.

    \b
    Examples:
      tempflow resume digits
    """
    with client(kubeconfig, context, namespace) as cluster:
        for job in jobs:
            cluster.resume(job)
            typer.echo(f"{job}: resumed")


@app.command()
def cancel(
    jobs: JobNames,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Stop jobs after a checkpoint, for good. They, their logs and checkpoints stay.

    \b
    Examples:
      tempflow cancel digits
    """
    with client(kubeconfig, context, namespace) as cluster:
        for job in jobs:
            cluster.cancel(job)
            typer.echo(
                f"{job}: cancelled; its checkpoints stay, 'tempflow delete {job}' removes it"
            )


@app.command()
def delete(
    jobs: JobNames,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Return before its pods are gone.")
    ] = False,
    timeout: Timeout = None,
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
            typer.echo(f"{job}: {'to be deleted' if no_wait else 'deleted'}")
