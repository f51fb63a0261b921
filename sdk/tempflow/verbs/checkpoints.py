"""``tempflow checkpoints list``: what a run has stored."""

from typing import Annotated

import typer

from tempflow.verbs.options import EndpointUrl, TextOrJson

app = typer.Typer(rich_markup_mode=None)
_listing = typer.Typer(
    help="Look at what a run has stored.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(_listing, name="checkpoints")


@_listing.command("list")
def list_checkpoints(
    uri: Annotated[str, typer.Argument(metavar="URI", help="Folder or s3:// of a run.")],
    endpoint_url: EndpointUrl = None,
    output: TextOrJson = "text",
) -> None:
    """List the complete checkpoints of a run.

    \b
    Examples:
      tempflow checkpoints list runs/digits
      tempflow checkpoints list s3://my-bucket/tempflow/digits
    """
    from tempflow import checkpoints, listing

    found = checkpoints.steps(checkpoints.open_store(uri, endpoint_url))
    for line in listing.checkpoints_as(output, found, uri):
        typer.echo(line)
