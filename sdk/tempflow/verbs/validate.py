"""``tempflow validate``: every problem of a manifest, with its line."""

from typing import Annotated, Literal

import typer

from tempflow.verbs.options import Overrides
from tempflow_api.errors import ExitCode

app = typer.Typer(rich_markup_mode=None)


@app.command()
def validate(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="- for stdin.")],
    overrides: Overrides = None,
    output: Annotated[
        Literal["text", "json", "yaml"],
        typer.Option("--output", "-o", help="yaml prints the job with its overrides applied."),
    ] = "text",
) -> None:
    """Check manifests, and show every problem with its line.

    \b
    Examples:
      tempflow validate job.yaml
      tempflow validate job.yaml --set spec.sampling.steps=20
      tempflow validate job.yaml --set spec.compute.nodes=2 -o yaml | kubectl apply -f -
      kubectl get tfgrpo my-job -o yaml | tempflow validate -
    """
    from tempflow import manifest, verdict

    verdicts = [verdict.judge(manifest.read, file, overrides or ()) for file in files]
    if output == "json":
        typer.echo(verdict.as_json(verdicts))
    elif output == "yaml":
        typer.echo(verdict.as_yaml(verdicts), nl=False)
    if output != "json":
        for one in verdicts:
            if output == "text" or not one.valid:
                typer.echo("\n".join(one.lines()), err=not one.valid)
    if not all(one.valid for one in verdicts):
        raise typer.Exit(ExitCode.INVALID)
