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
    probe: Annotated[
        bool,
        typer.Option("--probe", help="With FILE: a pod tries the store, as the cluster sees it."),
    ] = False,
    image: Annotated[
        str | None,
        typer.Option("--image", metavar="IMAGE", help="Of that pod; default the trainer's."),
    ] = None,
    output: TextOrJson = "text",
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Look for what keeps jobs from running, and say what to do about it.

    Versions, resource definition, your rights, operator, GPUs, queue, DNS, storage and images, as
    far as you may look; of a manifest also the Secret, claims and classes that it names. --probe
    starts a pod with the job's credentials, which creates, lists, reads and deletes a key in the
    store, and is then deleted. Exit code 0 without a fault, 68 with one.

    \b
    Examples:
      tempflow doctor
      tempflow doctor job.yaml -n research
      tempflow doctor job.yaml -n research --probe
    """
    import json

    from tempflow import manifest
    from tempflow.cluster import doctor as examination

    if file is None and (probe or image):
        raise typer.BadParameter("--probe and --image need a manifest: name its FILE")
    if image and not probe:
        raise typer.BadParameter("--image is that of the pod of --probe: add it")
    job = manifest.read(file).job if file is not None else None
    wanted = namespace or (job.metadata.namespace if job is not None else None)
    with client(kubeconfig, context, wanted) as cluster:
        findings = list(examination.examine(cluster.connection, job, probe=probe, image=image))
    if output == "json":
        typer.echo(json.dumps(examination.as_objects(findings), indent=2))
    else:
        typer.echo("\n".join(examination.lines(findings)))
    if any(finding.state == "fault" for finding in findings):
        raise typer.Exit(ExitCode.UNHEALTHY)
