"""``tempflow version``."""

import typer

app = typer.Typer(rich_markup_mode=None)


@app.command()
def version() -> None:
    """Show the version."""
    from importlib import metadata

    try:
        typer.echo(f"tempflow {metadata.version('tempflow')}")
    except metadata.PackageNotFoundError:
        typer.echo("tempflow (not installed, run from its source)")
