"""``tempflow pull``: a checkpoint, copied here."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tempflow.verbs.options import (
    Context,
    EndpointUrl,
    From,
    Image,
    Kubeconfig,
    Namespace,
    Profile,
    ViaCluster,
    checkpoint_of,
    console,
)

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
    form: Annotated[
        Literal["lora", "full", "state"],
        typer.Option("--format", help="lora, full: only what diffusers loads; state: all of it."),
    ] = "state",
    endpoint_url: EndpointUrl = None,
    profile: Profile = None,
    via_cluster: ViaCluster = False,
    image: Image = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Copy a checkpoint here, every file checked by its SHA-256.

    job/NAME is a job on the cluster; its store is read from here, with credentials of this machine,
    or with --via-cluster by a pod with the job's own, for as long as it takes.
    A transfer that broke off goes on where it was when the command is given again.

    \b
    Examples:
      tempflow pull s3://my-bucket/tempflow/digits
      tempflow pull job/digits
      tempflow pull job/digits --via-cluster
      tempflow pull runs/digits --step 20 --to digits-20
      tempflow pull s3://my-bucket/tempflow/digits --format lora --profile research
    """
    from tempflow import listing, pulling

    cluster = (kubeconfig, context, namespace)
    source = From(uri, endpoint_url, profile, cluster, via_cluster, image)
    with checkpoint_of(source, step) as (store, chosen):
        target = to or pulling.default_target(store, chosen)
        size = sum(file.size for file in pulling.files_of(chosen, form))
        with listing.transfer(console(stderr=True), size, "pulling") as advance:
            pulling.pull(store, chosen, target, advance, form)
    typer.echo(f"pulled step {chosen.step} to {target}")
