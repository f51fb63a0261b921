"""``tempflow rewards``: try scorers on picture files, by the trainer as a child process."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from tempflow.verbs.options import TextOrJson
from tempflow_api import naming

app = typer.Typer(rich_markup_mode=None)
_rewards = typer.Typer(
    help="See which rewards there are, and try one.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(_rewards, name="rewards")


@_rewards.command("list")
def list_rewards(output: TextOrJson = "text") -> None:
    """List the rewards: built-in ones and those of installed packages.

    \b
    Examples:
      tempflow rewards list
      tempflow rewards list -o json
    """
    _trainer([f"--output={output}", "list"])


@_rewards.command()
def score(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Picture files.")],
    reward: Annotated[
        str, typer.Option("--reward", metavar="NAME", help="One of the list, or module:Class.")
    ],
    prompts: Annotated[
        list[str],
        typer.Option("--prompt", metavar="TEXT", help="For all pictures; repeated, one each."),
    ],
    metadata: Annotated[
        str, typer.Option("--metadata", metavar="JSON", help="Further keys of the prompt's line.")
    ] = "{}",
    parameters: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the reward. Repeatable."),
    ] = None,
    endpoints: Annotated[
        list[str] | None,
        typer.Option("--endpoint", metavar="URL", help="A server that has the reward. Repeatable."),
    ] = None,
    token_variable: Annotated[
        str | None,
        typer.Option(
            "--token-variable",
            metavar="NAME",
            help="Environment variable with the token that the server asks for.",
        ),
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option("--device", help="Where its model runs.")
    ] = "cpu",
    output: TextOrJson = "text",
) -> None:
    """Score pictures as a run would.

    \b
    Examples:
      tempflow rewards score sign.png --reward ocr --prompt 'a sign "Open"'
      tempflow rewards score a.png b.png --reward pickscore --prompt 'a red dog'
      tempflow rewards score dogs.png --reward geneval --prompt 'two dogs' --set form=strict
          --metadata '{"include": [{"class": "dog", "count": 2}]}'
      tempflow rewards score a.png --reward my_package:Sharpness --prompt any -o json
      tempflow rewards score a.png --reward hpsv3 --prompt 'a red dog'
          --endpoint http://hpsv3:8090 --token-variable HPSV3_TOKEN
    """
    # As one word each: a text may begin with a dash.
    words = [f"--output={output}", "score", f"--reward={reward}", f"--device={device}"]
    words += [f"--prompt={prompt}" for prompt in prompts]
    words += [f"--metadata={metadata}", *(f"--set={pair}" for pair in parameters or ())]
    words += [f"--endpoint={url}" for url in endpoints or ()]
    words += [f"--token-variable={token_variable}"] if token_variable else []
    _trainer([*words, "--", *map(str, images)])


def _trainer(words: list[str]) -> None:
    from tempflow import local

    local.require_trainer()
    command = [sys.executable, "-m", naming.START_MODULE, "tempflow_trainer.score", *words]
    raise typer.Exit(subprocess.run(command, check=False).returncode)
