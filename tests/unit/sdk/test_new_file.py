"""Files that verbs write: never over another one unasked."""

from pathlib import Path

import pytest

from tempflow.new_file import write
from tempflow.refused import Refused


def test_a_file_is_not_overwritten_unasked(tmp_path: Path) -> None:
    target = tmp_path / "job.yaml"
    target.write_text("mine")
    with pytest.raises(Refused, match="exists: choose another with -o, or overwrite with --force"):
        write(target, "theirs", option="-o", overwrite=False)
    assert target.read_text() == "mine"
    write(target, "theirs", option="-o", overwrite=True)
    assert target.read_text() == "theirs"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no such file or directory"):
        write(tmp_path / "no" / "job.yaml", "text", option="--out", overwrite=False)
