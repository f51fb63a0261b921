"""``tempflow doctor``: what keeps jobs from running on a cluster."""

from typing import Annotated

import typer

from tempflow.verbs.options import Context, Kubeconfig, Namespace, TextOrJson, client
from tempflow_api.errors import ExitCode

app = typer.Typer(rich_markup_mode=None)


@app.command()
def doctor(
    file: Annotated[
        str | None,
        typer.Argument(metavar="[FILE]", help="A manifest: also look at what that job needs."),
    ] = None,
    output: TextOrJson = "text",
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Look for what keeps jobs from running, and say what to do about it.

    Versions, resource definition, your rights, operator, GPUs, queue, DNS, storage and images, as
    far as you may look. Exit code 0 without a fault, 68 with one.

    \b
    Examples:
      tempflow doctor
      tempflow doctor job.yaml -n research
    """
    import json

    from tempflow import manifest
    from tempflow.cluster import doctor as examination

    job = manifest.read(file).job if file is not None else None
    wanted = namespace or (job.metadata.namespace if job is not None else None)
    with client(kubeconfig, context, wanted) as cluster:
        findings = list(examination.examine(cluster.connection, job))
    if output == "json":
        typer.echo(json.dumps(examination.as_objects(findings), indent=2))
    else:
        typer.echo("\n".join(examination.lines(findings)))
    if any(finding.state == "fault" for finding in findings):
        raise typer.Exit(ExitCode.UNHEALTHY)
