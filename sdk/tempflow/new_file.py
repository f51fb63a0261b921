"""A file that a verb writes for its user."""

from pathlib import Path

from tempflow.refused import Refused


def write(target: Path, text: str, *, option: str, overwrite: bool) -> None:
    """Write a new file, or over an old one if asked to; ``option`` names it on the command line.

    Raises:
        Refused: the file exists, or cannot be written.
    """
    try:
        with target.open("w" if overwrite else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise Refused(
            f"{target} exists: choose another with {option}, or overwrite with --force"
        ) from error
    except OSError as error:
        raise Refused(f"cannot write {target}: {(error.strerror or str(error)).lower()}") from error
