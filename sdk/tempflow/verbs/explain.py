"""``tempflow explain``: what a run will do and cost."""

from typing import Annotated

import typer

from tempflow.verbs.options import Overrides, TextOrJson

app = typer.Typer(rich_markup_mode=None)


@app.command()
def explain(
    file: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="The manifest; - for stdin.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", metavar="NAME", help="A preset instead of a file.")
    ] = None,
    overrides: Overrides = None,
    width: Annotated[int | None, typer.Option("--width", help="What if: pixels.")] = None,
    height: Annotated[int | None, typer.Option("--height", help="What if: pixels.")] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="What if: denoising steps in training.")
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            "--rate",
            metavar="RATE",
            help="What a process computes: 400TFLOP/s, or 90/s forward rows of the network. "
            "Adds the seconds of an epoch.",
        ),
    ] = None,
    output: TextOrJson = "text",
) -> None:
    """Tell what a run will do and cost, before it does it. No weights are loaded.

    \b
    Examples:
      tempflow explain job.yaml
      tempflow explain --preset flux-hpsv3 --rate 250TFLOP/s
      tempflow explain --preset sd35m-pickscore --width 1024 --height 1024
      tempflow explain job.yaml --steps 16 -o json | jq .evaluations
    """
    from tempflow import explaining, local, manifest, presets

    if (file is None) == (preset is None):
        raise typer.BadParameter("give either a manifest or --preset NAME", param_hint="FILE")
    what_if = {"width": width, "height": height, "steps": steps}
    every = [*(overrides or ())]
    every += [
        f"spec.sampling.{name}={value}" for name, value in what_if.items() if value is not None
    ]
    if preset is not None:
        job = manifest.parse_text(presets.preset(preset).text, preset, every).job
    else:
        job = manifest.read(str(file), every).job
    local.require_trainer()
    found = explaining.explain(job, rate)
    if output == "json":
        typer.echo(found.model_dump_json(indent=2))
        return
    for line in explaining.lines(found):
        typer.echo(line)
