"""``tempflow submit``: jobs to a cluster."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tempflow.verbs.options import (
    Context,
    Form,
    Kubeconfig,
    Namespace,
    Overrides,
    Timeout,
    client,
    console,
    jobs_go_on,
    seconds,
)
from tempflow_api.errors import ExitCode

if TYPE_CHECKING:
    from tempflow.cluster.client import Client
    from tempflow.cluster.job import Job
    from tempflow.cluster.submission import Submission

app = typer.Typer(rich_markup_mode=None)


@app.command()
def submit(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE...]", help="Manifests; - for stdin.")
    ] = None,
    more_files: Annotated[
        list[str] | None,
        typer.Option("--filename", "-f", metavar="FILE", help="The same, as kubectl spells it."),
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        Literal["client", "server"] | None,
        typer.Option(
            "--dry-run",
            help="client prints what would be sent; server has it checked and completed there.",
        ),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until it has ended; exit code 60 when it failed.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show the logs, and wait for the end.")
    ] = False,
    timeout: Timeout = None,
    output: Form = "text",
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Run jobs on a cluster.

    Every manifest is checked before the first is sent. A local file in spec.data.promptsFile goes
    along, up to 900 KB, as a ConfigMap that the job owns. With --wait or --follow, Ctrl-C leaves
    the job running.

    \b
    Examples:
      tempflow submit job.yaml
      tempflow submit job.yaml --set metadata.name=try-2 --set spec.algorithm.epochs=50
      tempflow submit job.yaml --dry-run=server
      tempflow submit job.yaml --follow
      tempflow submit *.yaml -n research -o name
      cat job.yaml | tempflow submit -f - --wait --timeout 2h
    """
    from tempflow import manifest
    from tempflow.cluster.submission import prepare

    names = [*(files or ()), *(more_files or ())]
    if not names:
        raise typer.BadParameter("which manifest? - reads standard input", param_hint="FILE")
    if follow and len(names) > 1:
        raise typer.BadParameter("follows one job at a time", param_hint="--follow")
    if dry_run and (wait or follow):
        raise typer.BadParameter("nothing runs that could be waited for", param_hint="--dry-run")
    limit = seconds(timeout)
    manifests = [manifest.read(name, overrides or ()) for name in names]
    submissions = [prepare(one) for one in manifests]
    if dry_run == "client":
        _print_submissions(submissions, namespace, output)
        return
    with client(kubeconfig, context, namespace) as cluster:
        jobs: list[Job] = []
        try:
            for one in manifests:
                jobs.append(cluster.submit(one, namespace=namespace, dry_run=dry_run == "server"))
        finally:  # also of those before one that was refused
            _tell(jobs, output, several=len(manifests) > 1, dry_run=dry_run is not None)
        for job in jobs if wait or follow else ():
            with jobs_go_on(job.name):
                _see_through(cluster, job, follow=follow, limit=limit, text=output == "text")


def _print_submissions(submissions: "list[Submission]", namespace: str | None, output: str) -> None:
    import json

    import yaml

    bodies = [
        body
        for submission in submissions
        for body in submission.bodies(namespace or submission.job.metadata.namespace)
    ]
    if output == "name":
        typer.echo("\n".join(submission.job.metadata.name for submission in submissions))
    elif output == "json":
        typer.echo("\n".join(json.dumps(body, indent=2, ensure_ascii=False) for body in bodies))
    else:
        typer.echo(yaml.safe_dump_all(bodies, sort_keys=False, allow_unicode=True), nl=False)


def _tell(jobs: "list[Job]", output: str, *, several: bool, dry_run: bool) -> None:
    from tempflow.cluster import showing

    if output != "text":
        if jobs:
            typer.echo(showing.objects(output, jobs, several=several))
        return
    for job in jobs:
        done = "would be accepted" if dry_run else f"submitted; next: tempflow status {job.name}"
        typer.echo(f"{job.namespace}/{job.name}: {done}")


def _see_through(
    cluster: "Client", job: "Job", *, follow: bool, limit: float | None, text: bool
) -> None:
    """Until the job has ended; what is shown beside the logs goes where no program reads."""
    import time

    from tempflow.cluster import showing
    from tempflow.cluster.errors import JobFailed
    from tempflow.render import say

    started = time.monotonic()
    screen = console(stderr=follow or not text)
    try:
        if follow:
            prefix = job.spec.compute.nodes > 1
            for line in cluster.logs(
                job.name,
                follow=True,
                timeout_seconds=limit,
                on_trouble=lambda told: typer.echo(told, err=True),
            ):
                typer.echo(showing.log_text(line, prefix=prefix, timestamps=False))
        with showing.look(screen, plain=follow) as look:
            left = None if limit is None else max(0.0, started + limit - time.monotonic())
            done = cluster.wait(job.name, timeout_seconds=left, on_change=look.show)
    except JobFailed as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(ExitCode.JOB_FAILED) from None
    for told in showing.ending(done):
        say(screen, told)
