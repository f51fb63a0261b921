"""``tempflow checkpoints list``: what a run has stored."""

from typing import Annotated

import typer

from tempflow.verbs.options import Context, EndpointUrl, Kubeconfig, Namespace, TextOrJson, store_of

app = typer.Typer(rich_markup_mode=None)
_listing = typer.Typer(
    help="Look at what a run has stored.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(_listing, name="checkpoints")


@_listing.command("list")
def list_checkpoints(
    uri: Annotated[
        str, typer.Argument(metavar="URI", help="Folder or s3:// of a run, or job/NAME.")
    ],
    endpoint_url: EndpointUrl = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    output: TextOrJson = "text",
) -> None:
    """List the complete checkpoints of a run. job/NAME is a job on the cluster.

    \b
    Examples:
      tempflow checkpoints list runs/digits
      tempflow checkpoints list s3://my-bucket/tempflow/digits
      tempflow checkpoints list job/digits -n research
    """
    from tempflow import checkpoints, listing

    uri, endpoint_url = store_of(uri, endpoint_url, kubeconfig, context, namespace)
    found = checkpoints.steps(checkpoints.open_store(uri, endpoint_url))
    for line in listing.checkpoints_as(output, found, uri):
        typer.echo(line)
