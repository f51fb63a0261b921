"""``tempflow init``: a manifest to start from."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode=None)


@app.command()
def init(
    preset: Annotated[
        str | None, typer.Option("--preset", metavar="NAME", help="Which one; see --list.")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="List the presets.")] = False,
    out: Annotated[
        str | None,
        typer.Option("-o", "--out", metavar="FILE", help="Default NAME.yaml; - for stdout."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
) -> None:
    """Write a manifest to start from.

    \b
    Examples:
      tempflow init --list
      tempflow init --preset digits
      tempflow init --preset sd35m-pickscore -o job.yaml
    """
    from tempflow import new_file, presets

    if show:
        for line in presets.listing():
            typer.echo(line)
        return
    if preset is None:
        raise typer.BadParameter("which preset? --list shows them", param_hint="--preset")
    chosen = presets.preset(preset)
    target = out or f"{chosen.name}.yaml"
    if target == "-":
        typer.echo(chosen.text, nl=False)
        return
    new_file.write(Path(target), chosen.text, option="-o", overwrite=force)
    typer.echo(f"wrote {target}; next: tempflow validate {target}, then tempflow run {target}")
