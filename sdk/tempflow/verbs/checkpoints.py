"""``tempflow checkpoints``: what a run has stored, whether it is sound, and what is kept."""

import json
from typing import Annotated

import typer

from tempflow.verbs.options import (
    Context,
    EndpointUrl,
    From,
    Image,
    Kubeconfig,
    Namespace,
    Profile,
    TextOrJson,
    ViaCluster,
    checkpoint_of,
    console,
    open_checkpoint,
    open_run,
    run_of,
)
from tempflow.verbs.pull import pull

app = typer.Typer(rich_markup_mode=None)
_verbs = typer.Typer(
    help="Look after what a run has stored.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(_verbs, name="checkpoints")

Uri = Annotated[str, typer.Argument(metavar="URI", help="Folder or s3:// of a run, or job/NAME.")]
OneUri = Annotated[
    str,
    typer.Argument(metavar="URI", help="Folder or s3:// of a run or checkpoint, or job/NAME."),
]
StepNumber = Annotated[
    int | None, typer.Option("--step", metavar="N", help="Epochs completed; default newest.")
]


@_verbs.command("list")
def list_checkpoints(
    uri: Uri,
    endpoint_url: EndpointUrl = None,
    profile: Profile = None,
    via_cluster: ViaCluster = False,
    image: Image = None,
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
      tempflow checkpoints list job/digits -n research --via-cluster
    """
    from tempflow import checkpoints, listing

    cluster = (kubeconfig, context, namespace)
    with run_of(From(uri, endpoint_url, profile, cluster, via_cluster, image)) as store:
        checkpoints.require_folder(store)
        found, pinned = checkpoints.steps(store), checkpoints.pinned(store)
    for line in listing.checkpoints_as(output, found, store.uri, pinned):
        typer.echo(line)


@_verbs.command()
def show(
    uri: OneUri,
    step: StepNumber = None,
    endpoint_url: EndpointUrl = None,
    profile: Profile = None,
    via_cluster: ViaCluster = False,
    image: Image = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    output: TextOrJson = "text",
) -> None:
    """Show one checkpoint: where it comes from, how it evaluates, its files and digests.

    \b
    Examples:
      tempflow checkpoints show runs/digits
      tempflow checkpoints show job/digits --step 20
      tempflow checkpoints show s3://my-bucket/tempflow/digits -o json | jq .manifest.evaluation
    """
    from tempflow import checkpoints, listing

    cluster = (kubeconfig, context, namespace)
    source = From(uri, endpoint_url, profile, cluster, via_cluster, image)
    with checkpoint_of(source, step) as (store, chosen):
        pinned = checkpoints.pinned(store)
    for line in listing.checkpoint_as(output, chosen, store.uri, pinned):
        typer.echo(line)


@_verbs.command()
def verify(
    uri: OneUri,
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", help="Epochs completed; default all.")
    ] = None,
    endpoint_url: EndpointUrl = None,
    profile: Profile = None,
    via_cluster: ViaCluster = False,
    image: Image = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    output: TextOrJson = "text",
) -> None:
    """Read every file of the checkpoints and compare its SHA-256. Nothing is written.

    Exit code 89 when something is damaged: a run would go back to the checkpoint before.

    \b
    Examples:
      tempflow checkpoints verify runs/digits
      tempflow checkpoints verify s3://my-bucket/tempflow/digits --step 20
    """
    from tempflow import checkpoints, listing, pulling
    from tempflow_api import checkpoint_layout as layout
    from tempflow_api.errors import CheckpointCorrupt

    cluster = (kubeconfig, context, namespace)
    source = From(uri, endpoint_url, profile, cluster, via_cluster, image)
    named = layout.parse_folder(uri.rstrip("/").rpartition("/")[2]) is not None
    with checkpoint_of(source, step) as (store, newest):
        found = [newest] if named or step is not None else checkpoints.steps(store)
        total = sum(one.size for one in found)
        with listing.transfer(console(stderr=True), total, "verifying") as advance:
            wrong = pulling.verify(store, found, advance)
    if output == "json":
        typer.echo(json.dumps(wrong, indent=2))
    else:
        for folder, complaints in wrong.items():
            typer.echo(f"{folder}: {'; '.join(complaints) or 'sound'}")
    damaged = [folder for folder, complaints in wrong.items() if complaints]
    if damaged:
        raise CheckpointCorrupt(f"{len(damaged)} of {len(found)} checkpoints are damaged")


@_verbs.command("pin")
def pin_checkpoint(
    uri: OneUri,
    step: StepNumber = None,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="For others.")] = "",
    endpoint_url: EndpointUrl = None,
    profile: Profile = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Keep a checkpoint, whatever spec.checkpoint and prune say, until it is unpinned.

    \b
    Examples:
      tempflow checkpoints pin runs/digits --step 20
      tempflow checkpoints pin job/digits --step 20 --reason "figure 3"
    """
    from tempflow import keeping

    cluster = (kubeconfig, context, namespace)
    store, chosen = open_checkpoint(uri, step, endpoint_url, profile, cluster)
    made = keeping.pin(store, chosen, reason)
    typer.echo(f"{chosen.folder} {'is pinned' if made else 'was pinned already'}")


@_verbs.command()
def unpin(
    uri: OneUri,
    step: StepNumber = None,
    endpoint_url: EndpointUrl = None,
    profile: Profile = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Leave a pinned checkpoint to retention again. Nothing is deleted by this.

    \b
    Examples:
      tempflow checkpoints unpin runs/digits --step 20
    """
    from tempflow import keeping

    cluster = (kubeconfig, context, namespace)
    store, chosen = open_checkpoint(uri, step, endpoint_url, profile, cluster)
    was = keeping.unpin(store, chosen)
    typer.echo(f"{chosen.folder} {'is pinned no more' if was else 'was not pinned'}")


@_verbs.command()
def prune(
    uri: Uri,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only say what.")] = False,
    keep_last: Annotated[
        int | None,
        typer.Option("--keep-last", metavar="N", min=2, help="In place of that of the job."),
    ] = None,
    endpoint_url: EndpointUrl = None,
    profile: Profile = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    output: TextOrJson = "text",
) -> None:
    """Delete the checkpoints that the run's own rules do not keep, and what dead starts left.

    The rules are those of spec.checkpoint (keepLast, keepEvery, keepBest). Never deleted are pinned
    ones and the newest two. The run may be under way. Without --yes nothing is changed.

    \b
    Examples:
      tempflow checkpoints prune runs/digits
      tempflow checkpoints prune s3://my-bucket/tempflow/digits --keep-last 2 --yes
    """
    from tempflow import keeping, listing

    store = open_run(uri, endpoint_url, profile, (kubeconfig, context, namespace))
    plan = keeping.plan(store, keeping.retention_of(store, keep_last))
    if yes:
        plan = keeping.prune(store, plan)
    for line in listing.plan_as(output, plan, done=yes):
        typer.echo(line)


_verbs.command("pull")(pull)
