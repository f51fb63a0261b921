"""``tempflow pull``: a checkpoint, copied here."""

from pathlib import Path
from typing import Annotated

import typer

from tempflow.verbs.options import Context, EndpointUrl, Kubeconfig, Namespace, console, store_of

app = typer.Typer(rich_markup_mode=None)


@app.command()
def pull(
    uri: Annotated[
        str,
        typer.Argument(metavar="URI", help="Folder or s3:// of a run or checkpoint, or job/NAME."),
    ],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="A new folder; default NAME-step-N.")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", help="Epochs completed; default newest.")
    ] = None,
    endpoint_url: EndpointUrl = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Copy a checkpoint here, every file checked by its SHA-256.

    job/NAME is a job on the cluster; its store is read from here, with credentials of this machine.

    \b
    Examples:
      tempflow pull s3://my-bucket/tempflow/digits
      tempflow pull job/digits
      tempflow pull runs/digits --step 20 --to digits-20
    """
    from tempflow import checkpoints, listing

    uri, endpoint_url = store_of(uri, endpoint_url, kubeconfig, context, namespace)
    store, chosen = checkpoints.find(uri, step, endpoint_url)
    target = to or checkpoints.default_target(store, chosen)
    with listing.transfer(console(stderr=True), chosen.size) as advance:
        checkpoints.pull(store, chosen, target, advance)
    typer.echo(f"pulled step {chosen.step} to {target}")
