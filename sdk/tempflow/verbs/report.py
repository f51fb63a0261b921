"""``tempflow report``: a run as one page."""

from pathlib import Path
from typing import Annotated

import typer

from tempflow.verbs.options import (
    Context,
    EndpointUrl,
    Kubeconfig,
    Namespace,
    Profile,
    open_run,
)

app = typer.Typer(rich_markup_mode=None)


@app.command()
def report(
    uri: Annotated[
        str, typer.Argument(metavar="URI", help="Folder or s3:// of a run, or job/NAME.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The page to write; default NAME-report.html."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
    endpoint_url: EndpointUrl = None,
    profile: Profile = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Make one self-contained HTML page of a run: curves, pictures over time, configuration.

    Reads what the run has stored; it may still be under way. Needs no trainer, and the page fetches
    nothing. job/NAME is a job on the cluster; its store is read from here.

    \b
    Examples:
      tempflow report runs/digits
      tempflow report s3://my-bucket/tempflow/digits --out digits.html
      tempflow report job/digits -n research
    """
    from tempflow import new_file
    from tempflow import report as reports

    store = open_run(uri, endpoint_url, profile, (kubeconfig, context, namespace))
    record = reports.gather(store)
    target = out or Path(f"{record.name}-report.html")
    new_file.write(target, reports.page(record), option="--out", overwrite=force)
    typer.echo(f"wrote {target}: open it in a browser")
