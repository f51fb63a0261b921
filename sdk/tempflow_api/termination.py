"""What a container leaves behind: the last commit for the operator, and one line for people.

The trainer's launcher writes it as the container's termination message, Kubernetes keeps it in the
pod's status, and the operator reads it there. It is the only word about the last commit of an
attempt that ended between two reads of its progress.
"""

from pydantic import Field, ValidationError

from tempflow_api.base import Text, Uri
from tempflow_api.status import Count, Observed

# Kubernetes cuts a termination message off at 4096 bytes; the record comes first and stays whole.
_MOST_BYTES = 4096
_MARK = "tempflow-last-words: "


class LastWords(Observed):
    """Of the container in which rank 0 ran."""

    run_id: Text
    attempt: Count
    incarnation: Count = 0
    """Start of that attempt; the words of an older one do not replace a newer one's."""
    checkpoint_epoch: Count
    """Epochs completed in the newest complete checkpoint."""
    checkpoint_uri: Uri | None = Field(default=None)

    @property
    def start(self) -> tuple[int, int]:
        """Attempt and start of it: the higher one is the newer."""
        return self.attempt, self.incarnation


def compose(words: LastWords | None, line: str) -> str:
    """The termination message; empty when there is nothing to tell."""
    record = f"{_MARK}{words.model_dump_json(by_alias=True)}\n" if words is not None else ""
    room = _MOST_BYTES - len(record.encode()) - 1
    told = line.encode()[: max(room, 0)].decode(errors="ignore")
    return record + (f"{told}\n" if told else "")


def read(message: str) -> tuple[LastWords | None, str]:
    """The record, None when there is none that makes sense, and what is left for people."""
    words, rest = None, []
    for line in message.splitlines(keepends=True):
        if not line.startswith(_MARK):
            rest.append(line)
            continue
        try:
            words = LastWords.model_validate_json(line.removeprefix(_MARK))
        except ValidationError:
            continue
    return words, "".join(rest)
