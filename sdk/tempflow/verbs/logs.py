"""``tempflow logs`` and ``tempflow events``: what a job and the cluster say."""

from typing import Annotated

import typer

from tempflow.verbs.options import (
    Context,
    JobName,
    Kubeconfig,
    Namespace,
    TextOrJson,
    client,
    jobs_go_on,
)

app = typer.Typer(rich_markup_mode=None)


@app.command()
def logs(
    job: JobName,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")
    ] = False,
    previous: Annotated[
        bool, typer.Option("--previous", "-p", help="Of the attempt before the newest.")
    ] = False,
    attempt: Annotated[
        int | None, typer.Option("--attempt", min=1, metavar="N", help="Of this attempt.")
    ] = None,
    ranks: Annotated[
        list[int] | None,
        typer.Option("--rank", min=0, metavar="N", help="Of the pod with this index. Repeatable."),
    ] = None,
    tail: Annotated[
        int | None, typer.Option("--tail", min=0, metavar="N", help="The last lines of each pod.")
    ] = None,
    timestamps: Annotated[
        bool, typer.Option("--timestamps", help="Before each line its time, in UTC.")
    ] = False,
    output: TextOrJson = "text",
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Show what the pods of a job wrote, merged by time.

    Where a job has several pods, [ATTEMPT/INDEX] stands before each line. --follow takes later
    attempts along and bears a restart of the API server; Ctrl-C ends it, not the job.

    \b
    Examples:
      tempflow logs digits --tail 50
      tempflow logs digits --follow
      tempflow logs digits --previous --rank 0
      tempflow logs digits -o json | jq -r .text
    """
    from tempflow.cluster import showing

    with client(kubeconfig, context, namespace) as cluster, jobs_go_on(job):
        prefix = cluster.get(job).spec.compute.nodes > 1
        for line in cluster.logs(
            job,
            follow=follow,
            previous=previous,
            attempt=attempt,
            ranks=ranks or (),
            tail=tail,
            on_trouble=lambda told: typer.echo(f"warning: {told}", err=True),
        ):
            if output == "json":
                typer.echo(showing.as_json_line(line))
            else:
                typer.echo(showing.log_text(line, prefix=prefix, timestamps=timestamps))


@app.command()
def events(
    job: JobName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    output: TextOrJson = "text",
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Show what the cluster told about a job and its pods in the last hour.

    \b
    Examples:
      tempflow events digits
      tempflow events digits --follow
    """
    from tempflow.cluster import showing

    with client(kubeconfig, context, namespace) as cluster, jobs_go_on(job):
        if not follow and output == "text":
            found = list(cluster.events(job))
            if found:
                typer.echo("\n".join(showing.event_table(found)))
            else:
                typer.echo(f"no events about {job} in the last hour", err=True)
            return
        for event in cluster.events(job, follow=follow):
            if output == "json":
                typer.echo(showing.as_json_line(event))
            else:
                typer.echo("  ".join(showing.event_row(event)))
