"""``tempflow diff``: a manifest against the job on the cluster."""

from typing import Annotated

import typer

from tempflow.verbs.options import Context, Kubeconfig, Namespace, Overrides, TextOrJson, client
from tempflow_api.errors import ExitCode

app = typer.Typer(rich_markup_mode=None)


@app.command()
def diff(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The manifest; - for stdin.")],
    overrides: Overrides = None,
    output: TextOrJson = "text",
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Show in what a manifest differs from the job of its name, and what may change when.

    Exit code 0 without a difference, 69 with one.

    \b
    Examples:
      tempflow diff job.yaml
      tempflow diff job.yaml --set spec.optimizer.learningRate=1e-4
    """
    import json

    from tempflow import manifest
    from tempflow.cluster import comparing
    from tempflow.cluster.submission import prepare

    read = manifest.read(file, overrides or ())
    wanted = prepare(read).job
    with client(kubeconfig, context, namespace or wanted.metadata.namespace) as cluster:
        found = comparing.differences(cluster.get(wanted.metadata.name).spec, wanted.spec)
    if output == "json":
        typer.echo(json.dumps([change.as_object() for change in found], indent=2))
    else:
        for change in found:
            typer.echo(change.line())
    if found:
        raise typer.Exit(ExitCode.DIFFERENT)
