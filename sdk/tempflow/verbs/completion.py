"""``tempflow completion``: the script that lets a shell complete."""

import os
from typing import Annotated, Literal

import typer

app = typer.Typer(rich_markup_mode=None)
_ASKS = "_TEMPFLOW_COMPLETE"


@app.command()
def completion(
    context: typer.Context,
    shell: Annotated[
        Literal["bash", "zsh", "fish", "powershell"], typer.Argument(help="Which shell.")
    ],
) -> None:
    """Print the script that completes verbs and options.

    \b
    Examples:
      tempflow completion bash > ~/.local/share/bash-completion/completions/tempflow
      tempflow completion zsh > ~/.zfunc/_tempflow
      tempflow completion fish > ~/.config/fish/completions/tempflow.fish
    """
    # How a shell itself asks for the script.
    os.environ[_ASKS] = f"source_{shell}"
    try:
        context.find_root().command.main(args=[], prog_name="tempflow")
    finally:
        del os.environ[_ASKS]
