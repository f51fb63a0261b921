"""Prompts: what is read, in which order, and how an epoch is shared."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempflow_api.errors import ManifestInvalid
from tempflow_trainer.data import Prompt, PromptOrder, load_prompts
from tests.numerics.toys import spec_of
from tests.unit.trainer.conftest import BUCKET

law = settings(max_examples=40, deadline=None, derandomize=True)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(i, f"prompt {i}", {}) for i in range(count)]


def order(count: int, per_epoch: int, *, shuffle: bool = True, seed: int = 0) -> PromptOrder:
    return PromptOrder(prompts(count), per_epoch, 2, 1, shuffle, seed)


@law
@given(
    count=st.integers(1, 12),
    per_epoch=st.integers(1, 9),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**53 - 1),
)
def test_passes_follow_one_another_without_gap(
    count: int, per_epoch: int, shuffle: bool, seed: int
) -> None:
    found = order(count, per_epoch, shuffle=shuffle, seed=seed)
    epochs = 3 * count
    sequence = [found.prompt_at(e, p).id for e in range(epochs) for p in range(per_epoch)]
    for start in range(0, len(sequence) - count + 1, count):
        one_pass = sequence[start : start + count]
        assert sorted(one_pass) == list(range(count))
        assert shuffle or one_pass == list(range(count))


def test_passes_are_shuffled_anew_and_differ_between_seeds() -> None:
    found = order(20, 20)
    passes = [tuple(found.prompt_at(epoch, p).id for p in range(20)) for epoch in range(4)]
    other = tuple(order(20, 20, seed=1).prompt_at(0, p).id for p in range(20))
    assert len({*passes, other}) == 5


@law
@given(
    count=st.integers(1, 9),
    per_update=st.integers(1, 4),
    updates=st.integers(1, 4),
    seeds_per_prompt=st.integers(1, 4),
    world=st.integers(1, 6),
    epoch=st.integers(0, 5),
)
def test_the_ranks_share_every_update_without_gap_or_overlap(
    count: int, per_update: int, updates: int, seeds_per_prompt: int, world: int, epoch: int
) -> None:
    found = PromptOrder(prompts(count), per_update * updates, seeds_per_prompt, updates, True, 0)
    shares = [found.shares(epoch, rank=rank, world=world) for rank in range(world)]
    alone = found.shares(epoch, rank=0, world=1)
    for update in range(updates):
        dealt = Counter(
            (group.position, group.seed, group.prompt.id)
            for share in shares
            for group in share[update]
        )
        whole = Counter((group.position, group.seed, group.prompt.id) for group in alone[update])
        assert dealt == whole
        assert set(dealt.values()) == {1}
        assert len(dealt) == per_update * seeds_per_prompt
        sizes = [len(share[update]) for share in shares]
        assert max(sizes) - min(sizes) <= 1
    positions = [{group.position for group in share} for share in alone]
    assert [len(found) for found in positions] == [per_update] * updates
    assert set.union(*positions) == set(range(per_update * updates))


def load(path: Path) -> list[Prompt]:
    return load_prompts(spec_of({"data": {"promptsFile": str(path)}}))


def test_prompts_of_the_manifest_keep_their_order() -> None:
    found = load_prompts(spec_of({"data.prompts": ["b", "a"]}))
    assert [(p.id, p.text, p.metadata) for p in found] == [(0, "b", {}), (1, "a", {})]


def test_a_text_file_is_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("first\n\n  second  \r\nthird é", encoding="utf-8")
    assert [(p.id, p.text) for p in load(path)] == [(0, "first"), (1, "second"), (2, "third é")]


def test_further_keys_of_a_json_line_are_metadata(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a cat", "count": 2, "tags": ["x"]}\n\n{"prompt": "a dog"}\n')
    found = load(path)
    assert [p.text for p in found] == ["a cat", "a dog"]
    assert found[0].metadata == {"count": 2, "tags": ["x"]}
    assert found[1].metadata == {}


# Python counts these as ends of lines, JSON does not.
@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\x1c"], ids=["U+2028", "U+0085", "U+001C"])
def test_a_rare_separator_inside_a_prompt_does_not_cut_it(tmp_path: Path, mark: str) -> None:
    texts = [f"a{mark}cat", "a dog"]
    text_file, json_file = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text_file.write_text("\n".join(texts), encoding="utf-8")
    assert [p.text for p in load(text_file)] == texts
    if mark != "\x1c":  # a control character, which JSON escapes
        lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
        json_file.write_text("\n".join(lines), encoding="utf-8")
        assert [p.text for p in load(json_file)] == texts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "not JSON: .* at column 15"),
        ('{"text": "a"}', 'expected an object with a text "prompt"'),
        ('{"prompt": 3}', 'expected an object with a text "prompt"'),
        ('{"prompt": " "}', 'expected an object with a text "prompt"'),
        ('["a"]', 'expected an object with a text "prompt"'),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n\n{line}\n')
    with pytest.raises(
        ManifestInvalid, match=rf"prompts\.jsonl:3: spec\.data\.promptsFile: {message}"
    ):
        load(path)


def dataset(folder: Path, *parts: list[dict[str, object]]) -> Path:
    """As ``datasets`` saves one split: Arrow streams, and a file of state that lists them."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, rows in zip(names, parts, strict=True):
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_format_type": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


PARTS: list[list[dict[str, object]]] = [
    [{"prompt": "a cat", "count": 2}, {"prompt": "a dog", "count": None}],
    [{"prompt": "a hen", "count": 1}],
]


def test_a_saved_dataset_is_a_prompt_a_row(tmp_path: Path) -> None:
    found = load(dataset(tmp_path / "train", *PARTS))
    assert [(p.id, p.text, p.metadata["count"]) for p in found] == [
        (0, "a cat", 2),
        (1, "a dog", None),
        (2, "a hen", 1),
    ]


def cut(folder: Path) -> None:
    file = folder / "data-00001-of-00002.arrow"
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, r"data-00001-of-00002\.arrow: spec\.data\.promptsFile: cannot be read: "),
        (lambda f: (f / "data-00000-of-00002.arrow").unlink(), r"data-00000-of-00002.*cannot be r"),
        (lambda f: (f / "state.json").write_text("{}"), r"state\.json is damaged: KeyError"),
        (lambda f: (f / "state.json").write_text('{"_data_files": []}'), "holds no prompt"),
        (lambda f: (f / "state.json").unlink(), "cannot be read: .*directory"),
    ],
)
def test_a_damaged_dataset_is_described(
    damage: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    folder = dataset(tmp_path / "train", *PARTS)
    damage(folder)
    with pytest.raises(ManifestInvalid, match=words):
        load(folder)


def test_a_broken_row_is_named_as_people_count(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "a cat"}, {"prompt": " "}]
    with pytest.raises(ManifestInvalid) as found:
        load(dataset(tmp_path / "train", rows))
    assert found.value.problems[0].line == 2


def test_several_splits_are_asked_for_one(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(ManifestInvalid, match=r"name one, as in .*/train"):
        load(tmp_path)


def test_a_dataset_without_prompts_lists_what_it_has(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "train", [{"caption": "a cat", "url": "x"}])
    with pytest.raises(ManifestInvalid, match='text in column "prompt"; there is caption, url'):
        load(folder)


@pytest.fixture
def bucket(s3_client: Any, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    return s3_client


def test_prompts_come_from_s3_in_every_form(bucket: Any, tmp_path: Path) -> None:
    bucket.put_object(Bucket=BUCKET, Key="p/a.txt", Body=b"first\nsecond\n")
    bucket.put_object(Bucket=BUCKET, Key="p/a.jsonl", Body=b'{"prompt": "a cat", "count": 2}\n{}\n')
    for file in dataset(tmp_path / "train", *PARTS).iterdir():
        bucket.upload_file(str(file), BUCKET, f"p/train/{file.name}")

    def read(name: str) -> list[Prompt]:
        return load_prompts(spec_of({"data": {"promptsFile": f"s3://{BUCKET}/p/{name}"}}))

    assert [p.text for p in read("a.txt")] == ["first", "second"]
    assert [p.text for p in read("train")] == ["a cat", "a dog", "a hen"]
    with pytest.raises(ManifestInvalid, match=rf"s3://{BUCKET}/p/a\.jsonl:2: .*text \"prompt\""):
        read("a.jsonl")
    with pytest.raises(ManifestInvalid, match=rf"s3://{BUCKET}/p/none\.txt: .*cannot be read: "):
        read("none.txt")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n \n")
    with pytest.raises(ManifestInvalid, match="holds no prompt"):
        load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ManifestInvalid, match=r"none\.txt: spec\.data\.promptsFile: cannot be read"
    ):
        load(tmp_path / "none.txt")


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("größer".encode("latin-1"))
    with pytest.raises(ManifestInvalid, match="cannot be read"):
        load(path)
