"""``tempflow sample``: pictures drawn with a trained model."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(rich_markup_mode=None)


@app.command()
def sample(
    source: Annotated[
        Path, typer.Argument(metavar="FROM", help="Folder of a run, a checkpoint or a result.")
    ],
    prompts: Annotated[
        list[str], typer.Option("--prompt", metavar="TEXT", help="What to draw. Repeatable.")
    ],
    count: Annotated[int, typer.Option("--count", min=1, help="Images a prompt.")] = 8,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the start noise.")] = 0,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The picture to write.")
    ] = Path("grid.png"),
    base: Annotated[
        bool, typer.Option("--base", help="Draw with the model as it was before training.")
    ] = False,
    device: Annotated[
        Literal["cuda", "cpu"] | None,
        typer.Option("--device", help="Draw there, not on the device of the run."),
    ] = None,
) -> None:
    """Draw images with a trained model: one row a prompt.

    \b
    Examples:
      tempflow sample runs/digits --prompt 'a three' --prompt 'a seven'
      tempflow sample runs/digits --prompt 'a three' --base --out before.png
      tempflow sample result-of-a-gpu --prompt 'a cat' --device cpu
    """
    from tempflow import local, sampling

    local.require_trainer()
    code = sampling.sample(
        source, prompts, count=count, seed=seed, out=out, base=base, device=device
    )
    raise typer.Exit(code)
