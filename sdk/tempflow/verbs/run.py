"""``tempflow run``: train on this machine."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from tempflow.verbs.options import Overrides, TextOrJson, console

app = typer.Typer(rich_markup_mode=None)


@app.command()
def run(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The manifest; - for stdin.")],
    overrides: Overrides = None,
    work_dir: Annotated[
        Path, typer.Option("--work-dir", metavar="DIR", help="Gets one folder a job.")
    ] = Path("runs"),
    plain: Annotated[
        bool, typer.Option("--plain", help="A line an epoch, also in a terminal.")
    ] = False,
    output: TextOrJson = "text",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Refuse to continue an earlier run.")
    ] = False,
) -> None:
    """Train here, until done. The same command continues a run that was stopped.

    Ctrl-C stops after a checkpoint; a second Ctrl-C kills at once.

    \b
    Examples:
      tempflow run digits.yaml
      tempflow run digits.yaml --set spec.algorithm.epochs=100
      tempflow run digits.yaml -o json > summary.json
    """
    from tempflow import local, manifest, render

    job = manifest.read(file, overrides or ())
    local.require_trainer()
    if fresh:
        local.refuse_if_begun(job.job, work_dir)
    screen = console(stderr=output == "json")
    watcher = render.watcher_for(screen, plain=plain)
    outcome = local.run(job, watcher, work_dir=work_dir)
    if outcome.summary is None:
        errors = console(stderr=True) if outcome.code else screen
        for line in render.ending(outcome, _same_command()):
            render.say(errors, line)
    elif output == "json":
        typer.echo(outcome.summary.model_dump_json(by_alias=True, indent=2))
    else:
        for line in render.summary_lines(job.job, outcome.summary, outcome.folder):
            render.say(screen, line)
    raise typer.Exit(outcome.code)


def _same_command() -> str:
    """What to type to continue the run that this command started."""
    return shlex.join(["tempflow", *(word for word in sys.argv[1:] if word != "--fresh")])
