"""``tempflow list``, ``status`` and ``describe``: jobs of a cluster, looked at."""

from contextlib import suppress
from typing import Annotated, Literal

import typer

from tempflow.verbs.options import (
    Context,
    Form,
    JobName,
    Kubeconfig,
    Namespace,
    client,
    console,
    jobs_go_on,
)

app = typer.Typer(rich_markup_mode=None)


@app.command("list")
def list_jobs(
    all_namespaces: Annotated[
        bool, typer.Option("--all-namespaces", "-A", help="Of the whole cluster.")
    ] = False,
    selector: Annotated[
        str, typer.Option("--selector", "-l", metavar="LABELS", help="For instance team=vision.")
    ] = "",
    output: Form = "text",
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """List the jobs of a namespace.

    \b
    Examples:
      tempflow list
      tempflow list -A -o json
      tempflow list -l team=vision -o name
    """
    from tempflow.cluster import showing

    with client(kubeconfig, context, namespace) as cluster:
        jobs = list(cluster.list(all_namespaces=all_namespaces, selector=selector))
        where = "any namespace" if all_namespaces else f"namespace {cluster.namespace}"
    if output != "text":
        text = showing.objects(output, jobs, several=True, with_namespace=all_namespaces)
        typer.echo(text, nl=bool(text))
    elif jobs:
        typer.echo("\n".join(showing.table(jobs, with_namespace=all_namespaces)))
    else:
        typer.echo(f"no jobs in {where}", err=True)


@app.command()
def status(
    job: JobName,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Until it has ended, also in a pipe.")
    ] = False,
    once: Annotated[bool, typer.Option("--once", help="Now, and no more.")] = False,
    output: Form = "text",
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Show how far a job is and how its reward went: live in a terminal, once in a pipe.

    \b
    Examples:
      tempflow status digits
      tempflow status digits --watch | tee progress.txt
      tempflow status digits -o json | jq .status.progress
    """
    from tempflow.cluster import showing
    from tempflow.cluster.errors import JobFailed

    screen = console(stderr=False)
    with client(kubeconfig, context, namespace) as cluster:
        found = cluster.get(job)
        if output != "text":
            typer.echo(showing.objects(output, [found], several=False))
        elif once or found.finished or not (watch or screen.is_terminal):
            typer.echo("\n".join(showing.status_lines(found)))
        else:
            # How it ended is an answer here, not an error.
            with (
                jobs_go_on(job),
                showing.look(screen, plain=False) as look,
                suppress(JobFailed),
            ):
                cluster.wait(job, on_change=look.show)
            if screen.is_terminal:  # where the view is gone by now
                typer.echo("\n".join(showing.status_lines(cluster.get(job))))


@app.command()
def describe(
    job: JobName,
    output: Annotated[
        Literal["text", "json", "yaml"],
        typer.Option("--output", "-o", help="json and yaml: the job, and its events."),
    ] = "text",
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Show all about a job: what it is, its conditions, its attempts and why they ended, events.

    \b
    Examples:
      tempflow describe digits
    """
    from tempflow.cluster import showing

    with client(kubeconfig, context, namespace) as cluster:
        found, events = cluster.get(job), list(cluster.events(job))
    if output == "text":
        typer.echo("\n".join(showing.description(found, events)))
    else:
        typer.echo(showing.job_and_events(output, found, events))
