"""From YAML and overrides to a typed job."""

import io
import sys
from pathlib import Path

import pytest

from tempflow.complaints import _PATTERNS
from tempflow.manifest import parse_text, read
from tempflow.yaml_source import parse
from tempflow_api.errors import ManifestInvalid, Problem
from tempflow_api.v1alpha1 import TempFlowGRPOJob
from tests.unit.sdk.manifests import VALID, edited, write


def lines_of(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ManifestInvalid) as caught:
        parse_text(text, "job.yaml", overrides)
    return caught.value.lines()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("3E4", 3e4),
        ("1.5e3", 1.5e3),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("+1", 1),
        ("0", 0),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", "017"),
        ("1_000", "1_000"),
        ("1.2.3", "1.2.3"),
        ("e3", "e3"),
        ("12:30:45", "12:30:45"),
        ("2026-01-31", "2026-01-31"),
        ("yes", "yes"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("'3e-4'", "3e-4"),
        ('"true"', "true"),
        ("!!str 5", "5"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    parsed = parse(f"key: {text}\n")
    assert parsed.value == {"key": value}
    assert type(parsed.value["key"]) is type(value)
    assert parsed.problems == []


def test_a_learning_rate_in_exponent_form_is_a_number() -> None:
    job = parse_text(edited(("  compute:", "  optimizer: {learningRate: 3e-4}\n  compute:")), "j")
    assert job.job.spec.optimizer.learning_rate == 3e-4


def test_anchors_and_merge_keys_work() -> None:
    text = edited(
        (
            '      parameters: {target: "0.45"}',
            (
                '      parameters: &ink {target: "0.45"}\n'
                '    - {name: digit-contrast, weight: 0, parameters: {<<: *ink, extra: "1"}}'
            ),
        )
    )
    rewards = parse_text(text, "job.yaml").job.spec.rewards
    assert rewards[2].parameters == {"target": "0.45", "extra": "1"}


def test_an_own_key_beats_a_merged_one() -> None:
    assert parse("a: &a {x: 1, y: 1}\nb: {<<: *a, x: 2}\n").value == {
        "a": {"x": 1, "y": 1},
        "b": {"x": 2, "y": 1},
    }


def test_an_alias_bomb_is_refused_quickly() -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
    )
    assert [p.message for p in parse(text).problems] == ["has more than 20000 values"]


def test_a_byte_order_mark_and_windows_line_ends_are_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode())
    assert read(str(path)).job.metadata.name == "demo"


def test_json_is_accepted() -> None:
    text = parse_text(VALID, "job.yaml").job.model_dump_json(by_alias=True, exclude_none=True)
    assert parse_text(text, "job.json").job.metadata.name == "demo"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ManifestInvalid) as caught:
        read(str(tmp_path / "no.yaml"))
    assert caught.value.lines() == [
        f"{tmp_path / 'no.yaml'}: manifest: cannot be read: no such file or directory"
    ]


def test_a_file_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(ManifestInvalid, match="is not text in UTF-8"):
        read(str(path))


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(VALID.replace("steps: 10", "steps: 1")))
    with pytest.raises(ManifestInvalid) as caught:
        read("-")
    assert caught.value.lines() == ["stdin:16: spec.sampling.steps: got 1: expects at least 2"]


class TestServerFields:
    def test_what_kubectl_get_prints_is_accepted(self) -> None:
        text = edited(
            (
                "  name: demo",
                (
                    "  name: demo\n  uid: 6f1c\n  resourceVersion: '12'\n  generation: 2\n"
                    "  creationTimestamp: 2026-01-31T12:00:00Z\n"
                    "  managedFields: [{manager: kubectl}]\n"
                    "  ownerReferences: []\n  finalizers: [tempflow.dev/cleanup]\n"
                    "  namespace: team\n  labels: {a: b}"
                ),
            ),
            ("  compute:", "  compute:"),
        )
        job = parse_text(f"{text}status:\n  phase: Strange\n  anything: 1\n", "job.yaml").job
        assert job.status is None
        assert (job.metadata.namespace, job.metadata.labels) == ("team", {"a": "b"})

    def test_elsewhere_they_are_unknown(self) -> None:
        assert lines_of(edited(("  sampling:", "  uid: x\n  sampling:")))[0].startswith(
            "job.yaml:15: spec.uid: unknown field"
        )


class TestOverrides:
    def test_a_scalar_is_read_as_yaml(self) -> None:
        spec = parse_text(
            VALID,
            "j",
            [
                "spec.optimizer.learningRate=1e-3",
                "spec.rewards[1].weight=2.5",
                'spec.rewards[1].parameters.target="0.5"',
                "spec.data.prompts=[a one, a two]",
                "spec.runPolicy.maxRestarts=0",
            ],
        ).job.spec
        assert spec.optimizer.learning_rate == 1e-3
        assert spec.rewards[1].weight == 2.5
        assert spec.rewards[1].parameters == {"target": "0.5"}
        assert spec.data.prompts == ["a one", "a two"]
        assert spec.run_policy.max_restarts == 0

    def test_the_last_one_wins(self) -> None:
        job = parse_text(VALID, "j", ["spec.algorithm.epochs=5", "spec.algorithm.epochs=6"]).job
        assert job.spec.algorithm.epochs == 6

    def test_an_entry_can_be_added_at_the_end_of_a_list(self) -> None:
        job = parse_text(VALID, "j", ["spec.rewards[2]={name: digit-judge, weight: 0}"]).job
        assert [r.name for r in job.spec.rewards][2] == "digit-judge"

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            (
                "spec.sampling.step=20",
                "spec.sampling.step: unknown field; did you mean 'steps'? (from --set)",
            ),
            (
                "spec.sampling.steps=1",
                "spec.sampling.steps: got 1: expects at least 2 (from --set)",
            ),
            (
                "sampling.steps=20",
                "sampling: unknown field; 'sampling' belongs to spec (from --set)",
            ),
            (
                "spec.sampling.steps",
                (
                    "--set: got 'spec.sampling.steps': expects path=value, for instance "
                    "spec.sampling.steps=20"
                ),
            ),
            (
                "spec.rewards[7].weight=1",
                "spec.rewards[7]: cannot be set: spec.rewards has the length 2 (from --set)",
            ),
            (
                "spec.rewards.0.weight=1",
                (
                    "spec.rewards['0']: cannot be set: spec.rewards is a list: write "
                    "spec.rewards[0] for its first entry (from --set)"
                ),
            ),
            (
                "spec.data.prompts=[a",
                (
                    "spec.data.prompts: is not valid YAML: expected ',' or ']', but got "
                    "'<stream end>' (while parsing a flow sequence) (from --set)"
                ),
            ),
            (
                "spec.compute.device=",
                "spec.compute.device: got nothing: expects 'cuda' or 'cpu' (from --set)",
            ),
            (
                "spec.sampling.height=28",
                (
                    "spec.sampling.height: is 14 for the digits family, which draws 14 x 14 "
                    "pixels; got height 28 (from --set), model.family 'digits'"
                ),
            ),
            (
                "spec.algorithm.branchSteps=[0, 9]",
                (
                    "spec.algorithm.branchSteps: each is less than sampling.steps - 1: the last "
                    "step has almost no noise, its likelihood overflows; got branchSteps [0, 9] "
                    "(from --set), sampling.steps 10"
                ),
            ),
        ],
    )
    def test_what_is_wrong_with_one(self, override: str, message: str) -> None:
        lines = lines_of(VALID, override)
        assert len(lines) == 1
        assert lines[0].removeprefix("job.yaml").lstrip(":0123456789 ") == message

    def test_one_may_repair_the_file(self) -> None:
        text = edited(("steps: 10", 'steps: "10"'))
        assert parse_text(text, "j", ["spec.sampling.steps=10"]).job.spec.sampling.steps == 10


class TestPromptsFile:
    EDIT = ("    prompts:\n      - a three\n      - a four", "    promptsFile: sets/prompts.txt")

    def test_is_relative_to_the_manifest(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "jobs").mkdir()
        write(tmp_path / "jobs", self.EDIT)
        monkeypatch.chdir(tmp_path)
        found = read("jobs/job.yaml").job.spec.data.prompts_file
        assert found == str((tmp_path / "jobs/sets/prompts.txt").resolve())

    @pytest.mark.parametrize("given", ["/data/prompts.txt", "s3://bucket/prompts.txt"])
    def test_is_left_alone_if_it_is_complete(self, given: str, tmp_path: Path) -> None:
        path = write(tmp_path, (self.EDIT[0], f"    promptsFile: {given}"))
        assert read(str(path)).job.spec.data.prompts_file == given


def test_later_problems_are_located_in_the_file() -> None:
    manifest = parse_text(VALID, "job.yaml")
    with pytest.raises(ManifestInvalid) as caught:
        manifest.check([Problem("spec.rewards[1].weight", "x"), Problem("spec.runPolicy", "y")])
    assert caught.value.lines() == [
        "job.yaml:32: spec.rewards[1].weight: x",
        "job.yaml:5: spec.runPolicy: y",
    ]
    manifest.check([])


def test_every_pattern_of_the_contract_has_words() -> None:
    def patterns(node: object) -> set[str]:
        if isinstance(node, dict):
            own = {node["pattern"]} if isinstance(node.get("pattern"), str) else set()
            return own.union(*(patterns(value) for value in node.values()))
        return set().union(*map(patterns, node)) if isinstance(node, list) else set()

    # Of the spec and the metadata; nobody writes status.
    schema = TempFlowGRPOJob.model_json_schema()["$defs"]
    written = {name: schema[name] for name in schema if name not in _status_models()}
    assert patterns(written) == set(_PATTERNS)


def _status_models() -> set[str]:
    from tempflow_api import status

    return {name for name in vars(status) if name[0].isupper()}
