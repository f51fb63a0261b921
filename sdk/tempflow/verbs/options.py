"""Options that several verbs have, spelled and explained alike."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Override a field, for instance spec.algorithm.epochs=5. Repeatable.",
    ),
]
TextOrJson = Annotated[
    Literal["text", "json"], typer.Option("--output", "-o", help="Form of the result on stdout.")
]
EndpointUrl = Annotated[
    str | None,
    typer.Option("--endpoint-url", metavar="URL", help="Address of a store other than Amazon's."),
]


def console(*, stderr: bool) -> "Console":
    """Where text for people goes."""
    from rich.console import Console

    return Console(stderr=stderr)
