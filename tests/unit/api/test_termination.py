"""Last words survive what Kubernetes does to them, and nothing else is taken for them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempflow_api.termination import LastWords, compose, read

WORDS = LastWords(
    run_id="team/demo-1", attempt=2, checkpoint_epoch=7, checkpoint_uri="s3://b/" + "x" * 1000
)


@given(st.text(st.characters(exclude_categories=["C", "Z"]), max_size=6000))
def test_the_record_stays_whole_however_much_there_is_to_say(line: str) -> None:
    message = compose(WORDS, line)
    assert len(message.encode()) <= 4096
    words, rest = read(message)
    assert words == WORDS
    assert line.startswith(rest.strip())


@pytest.mark.parametrize("line", ["", "rank 1 died"])
def test_people_are_told_without_a_record_too(line: str) -> None:
    assert read(compose(None, line)) == (None, f"{line}\n" if line else "")


@pytest.mark.parametrize(
    "record", ["", "{", "{}", '{"runId": "x", "attempt": -1, "checkpointEpoch": 1}', "null"]
)
def test_what_is_no_record_tells_nothing(record: str) -> None:
    assert read(f"tempflow-last-words: {record}\nboom\n") == (None, "boom\n")
