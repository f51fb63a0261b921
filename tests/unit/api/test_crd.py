"""The custom resource definition: what the API server takes, and what it decides with it.

The same file is given to a real API server by the cluster tests; here the parts are looked at.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from jsonschema import Draft4Validator
from pydantic import ValidationError

from tempflow_api import crd, reference
from tempflow_api.base import Section
from tempflow_api.conditions import CONDITION_MEANINGS, REASON_MEANINGS, ConditionType, Reason
from tempflow_api.errors import ExitCode
from tempflow_api.rules import RULES, Mutability, mutability_of
from tempflow_api.status import JobStatus
from tempflow_api.v1alpha1 import JobSpec
from tests.builders import Raw, make_job

ROOT = Path(__file__).parents[3]
COMMITTED = ROOT / "charts/tempflow/files/crd.yaml"
REFERENCE = ROOT / "docs/reference.md"
SPEC = crd.schema_of(JobSpec)

# https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/ names what is allowed.
ALLOWED = {
    "type", "properties", "required", "items", "additionalProperties", "description", "default",
    "enum", "format", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "minLength", "maxLength", "minItems", "maxItems", "maxProperties", "x-kubernetes-validations",
    "x-kubernetes-list-type", "x-kubernetes-list-map-keys",
}  # fmt: skip


def nodes(schema: Raw, path: str) -> Iterator[tuple[str, Raw]]:
    """Every schema within a schema, with where it is."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from nodes(schema[key], f"{path}.{key}")


ROOT_SCHEMA = crd.definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
EVERY_NODE = list(nodes(ROOT_SCHEMA, "root"))


class TestTheFile:
    def test_the_committed_files_are_current(self) -> None:
        remedy = "python -m tempflow_api.crd --write, python -m tempflow_api.reference --write"
        assert COMMITTED.read_text() == crd.document(), remedy
        assert REFERENCE.read_text() == reference.document(), remedy

    def test_kubectl_apply_has_room_for_a_copy_in_an_annotation(self) -> None:
        assert len(crd.document().encode()) <= crd.MAX_BYTES

    def test_its_yaml_says_the_same(self) -> None:
        assert yaml.safe_load(crd.document()) == crd.definition()

    @pytest.mark.parametrize(
        "value", [{}, [], {"a": []}, {"a": {}}, [[1, 2], [3]], [{"a": [1], "b": None}], 1e-8, 1e6,
                  -2.5, "yes", "1e3", "a: b", "# no", "ä\n\\", {"a/b": True, "-": 1}]
    )  # fmt: skip
    def test_any_json_survives_the_yaml(self, value: object) -> None:
        assert yaml.safe_load(crd.to_yaml(value)) == value

    def test_names(self) -> None:
        spec = crd.definition()["spec"]
        assert crd.definition()["metadata"]["name"] == "tempflowgrpojobs.tempflow.dev"
        assert (spec["scope"], spec["group"]) == ("Namespaced", "tempflow.dev")
        assert spec["names"]["shortNames"] == ["tfgrpo"]
        assert spec["names"]["categories"] == ["tempflow"]
        assert spec["versions"][0]["subresources"] == {"status": {}}


class TestTheCommand:
    def run(self, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["crd", *arguments])
        return crd.main()

    def test_prints(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(monkeypatch) == 0
        assert capsys.readouterr().out == crd.document()

    def test_writes_and_checks(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        file = tmp_path / "new" / "crd.yaml"
        assert self.run(monkeypatch, "--check", str(file)) == 1
        assert self.run(monkeypatch, "--write", str(file)) == 0
        assert self.run(monkeypatch, "--check", str(file)) == 0
        file.write_text(file.read_text() + "\n")
        assert self.run(monkeypatch, "--check", str(file)) == 1
        assert "--write" in capsys.readouterr().err


class TestTheSchema:
    def test_has_nothing_that_is_not_structural(self) -> None:
        strange = {path: set(node) - ALLOWED for path, node in EVERY_NODE if set(node) - ALLOWED}
        assert strange == {}
        assert all("type" in node for _, node in EVERY_NODE)

    def test_every_string_and_list_of_the_spec_is_bounded(self) -> None:
        """The API server estimates the cost of rules from these bounds."""
        for path, node in nodes(SPEC, "spec"):
            if node["type"] == "string" and "enum" not in node:
                assert "maxLength" in node, path
            if node["type"] == "array":
                assert "maxItems" in node, path
            if isinstance(node.get("additionalProperties"), dict):
                assert "maxProperties" in node, path

    def test_every_field_of_the_spec_is_described(self) -> None:
        obvious = {"learningRate", "beta1", "beta2", "epsilon", "weightDecay", "imagesPerPrompt"}
        for path, node in nodes(SPEC, "spec"):
            name = path.rsplit(".", 1)[-1]
            if name not in {"spec", "items", "additionalProperties", "region", *obvious}:
                assert node.get("description"), path

    def test_its_defaults_are_the_models(self) -> None:
        written = make_job().build()["spec"]
        minimal = {key: written[key] for key in ("model", "data", "rewards", "compute")}
        minimal["model"] = {"family": "digits", "source": "builtin:digits", "tuning": "full"}
        minimal["rewards"] = [{"name": "digit"}]
        typed = JobSpec.model_validate(minimal)
        expected = typed.model_dump(mode="json", by_alias=True, exclude_none=True)
        assert with_defaults(minimal, SPEC) == expected

    def test_status_has_no_defaults(self) -> None:
        assert all("default" not in node for _, node in nodes(crd.status_schema(), "status"))

    def test_only_the_name_is_restricted_of_the_metadata(self) -> None:
        metadata = ROOT_SCHEMA["properties"]["metadata"]
        assert set(metadata["properties"]) == {"name"}
        assert metadata["properties"]["name"]["maxLength"] == 45


def with_defaults(value: Any, schema: Raw) -> Any:
    """What the API server stores: absent fields that have a default get it, outside in."""
    if schema["type"] == "array":
        return [with_defaults(item, schema["items"]) for item in value]
    if "properties" not in schema:
        return value
    filled = dict(value)
    for name, child in schema["properties"].items():
        if name not in filled and "default" in child:
            filled[name] = child["default"]
        if name in filled:
            filled[name] = with_defaults(filled[name], child)
    return filled


BAD_VALUES = [
    ("algorithm.epochs", 0), ("algorithm.clipRange", 0.0), ("algorithm.clipRange", 1.0),
    ("model.family", "dalle"), ("sampling.steps", 1001), ("sampling.noiseLevel", 0.0),
    ("rewards", []), ("compute.memory", "much"), ("model.ema.decay", 1.0),
    ("algorithm.seed", 2**53), ("checkpoint.keepLast", 1), ("data.prompts", [""]),
    ("runPolicy.suspend", "no"), ("model.source", ""),
]  # fmt: skip
GOOD_VALUES = [
    ("algorithm.clipRange", 1e-9), ("sampling.noiseLevel", 10), ("model.ema.decay", 0),
    ("compute.memory", "1.5Gi"), ("algorithm.branchSteps", [0, 3]), ("algorithm.seed", 2**53 - 1),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), BAD_VALUES + GOOD_VALUES)
def test_schema_and_model_agree(path: str, value: object) -> None:
    """Draft 4 is where the boolean form of exclusive bounds comes from."""
    spec = make_job().spec(path, value).build()["spec"]
    by_schema = Draft4Validator(SPEC).is_valid(spec)
    try:
        JobSpec.model_validate(spec)
        by_model = True
    except ValidationError:
        by_model = False
    assert by_schema == by_model == ((path, value) in GOOD_VALUES)


class TestRefusals:
    def test_a_union(self) -> None:
        class Either(Section):
            field: int | str = 1

        with pytest.raises(crd.NotStructural, match=r"Either\.field.*2 types"):
            crd.schema_of(Either)

    def test_a_tuple(self) -> None:
        class Pair(Section):
            field: tuple[int, int] = (1, 2)

        with pytest.raises(crd.NotStructural, match=r"Pair\.field.*tuples"):
            crd.schema_of(Pair)

    def test_anything(self) -> None:
        class Open(Section):
            field: Any = None

        with pytest.raises(crd.NotStructural, match=r"Open\.field.*type"):
            crd.schema_of(Open)

    def test_a_section_whose_default_is_not_its_fields(self) -> None:
        class Inner(Section):
            field: int = 1

        class Outer(Section):
            inner: Inner = Inner(field=2)

        with pytest.raises(crd.NotStructural, match="default of a section"):
            crd.schema_of(Outer)

    def test_a_constant_is_an_enum_of_one(self) -> None:
        class One(Section):
            field: Literal["only"] = "only"

        assert crd.schema_of(One)["properties"]["field"]["enum"] == ["only"]


LEAVES = [
    path.removeprefix("spec.")
    for path, node in nodes(SPEC, "spec")
    if "properties" not in node
    and ".items" not in path
    and "additionalProperties" not in path
    and path != "spec.runPolicy.suspend"  # it decides on the others
]


class Seen(dict[str, Any]):
    """An object as CEL sees it: fields by name, absent fields only through ``has``."""

    __getattr__ = dict.__getitem__


def as_cel(value: Any) -> Any:
    return Seen({k: as_cel(v) for k, v in value.items()}) if isinstance(value, dict) else value


def allowed(old: Raw, new: Raw) -> bool:
    """The transition rules' verdict. Their CEL is simple enough to be read as Python; the cluster
    tests ask the API server."""
    scope = {"self": as_cel(new), "oldSelf": as_cel(old), "has": lambda part: part is not None}
    for rule in crd.transition_rules(SPEC):
        text = rule["rule"].replace("&&", " and ").replace("||", " or ").replace("!has", "not has")
        for holder in ("self", "oldSelf"):
            for path in sorted([*LEAVES, "model.lora", "initFrom"], key=len, reverse=True):
                section, _, field = path.rpartition(".")
                block = f"{holder}.{section}" if section else holder
                text = text.replace(f"has({holder}.{path})", f"has({block}.get('{field}'))")
        if not eval(text, scope):
            return False
    return True


def changed(value: object) -> object:
    """Some other value; whether the schema takes it is not the question here."""
    return {"other": 1} if isinstance(value, dict) else [value] if value is not None else "new"


@pytest.mark.parametrize("path", LEAVES)
def test_every_field_changes_when_it_may(path: str) -> None:
    """Fields changed alone, and optional ones given where they were absent."""
    mutability = mutability_of(f"spec.{path}")
    for before, after in [(False, False), (True, True), (True, False), (False, True)]:
        old = make_job().spec("model.lora", {}).suspended(before).build()["spec"]
        new = make_job().spec("model.lora", {}).suspended(after)
        block = old
        for section in path.split(".")[:-1]:
            block = block.get(section, {})
        new.spec(path, changed(block.get(path.rsplit(".", 1)[-1])))
        suspended = before or after
        expected = mutability is Mutability.MUTABLE or (
            mutability is Mutability.WHILE_SUSPENDED and suspended
        )
        assert allowed(old, new.build()["spec"]) == expected, (before, after)


def test_an_unchanged_spec_is_no_transition() -> None:
    assert allowed(make_job().build()["spec"], make_job().build()["spec"])


class TestRules:
    def test_every_rule_is_there_at_a_field_that_exists(self) -> None:
        rules = crd.spec_schema()["x-kubernetes-validations"]
        assert [rule["rule"] for rule in rules[: len(RULES)]] == [rule.cel for rule in RULES]
        known = {path.removeprefix("spec") for path, _ in nodes(SPEC, "spec")}
        assert {rule["fieldPath"] for rule in rules} <= known

    def test_a_message_is_a_line(self) -> None:
        for rule in crd.spec_schema()["x-kubernetes-validations"]:
            assert 0 < len(rule["message"]) < 300
            assert "\n" not in rule["message"]


def resolved(path: str, thing: Raw) -> object:
    """The value at one of the printer columns' paths."""
    if "[?(" in path:
        kind = path.split('"')[1]
        conditions = thing["status"]["conditions"]
        return next(condition["reason"] for condition in conditions if condition["type"] == kind)
    for name in path.strip(".").split("."):
        thing = thing[name]
    return thing


def test_kubectl_get_shows() -> None:
    job = make_job().nodes(4).build()
    job["metadata"]["creationTimestamp"] = "2026-01-31T12:00:00Z"
    job["status"] = {
        "phase": "Running",
        "attempt": 2,
        "replicas": {"running": 3},
        "restarts": {"failures": 1},
        "progressText": "12/100",
        "checkpoint": {"epoch": 10, "uri": "s3://bucket/x"},
        "conditions": [{"type": "Running", "reason": "PodsRunning"}],
    }
    shown = {column["name"]: resolved(column["jsonPath"], job) for column in crd.COLUMNS}
    assert shown == {
        "State": "Running",
        "Nodes": 4,
        "Ready": 3,
        "Progress": "12/100",
        "Restarts": 1,
        "Age": "2026-01-31T12:00:00Z",
        "Attempt": 2,
        "Reason": "PodsRunning",
        "Checkpoint": "s3://bucket/x",
    }
    assert [c["name"] for c in crd.COLUMNS if c.get("priority")] == [
        "Attempt", "Reason", "Checkpoint",
    ]  # fmt: skip


class TestTheReference:
    def test_names_and_describes_every_field(self) -> None:
        text = reference.document().replace("\\|", "|")
        for schema in (SPEC, crd.schema_of(JobStatus)):
            for path, node in nodes(schema, "root"):
                name = path.rsplit(".", 1)[-1]
                if name not in ("root", "items", "additionalProperties"):
                    assert f"`{name}`" in text, path
                    assert node.get("description", "").replace("``", "`") in text, path

    def test_explains_every_condition_reason_and_code(self) -> None:
        assert set(CONDITION_MEANINGS) == set(ConditionType)
        assert set(REASON_MEANINGS) == set(Reason)
        assert set(reference.EXIT_MEANINGS) == set(ExitCode)

    @pytest.mark.parametrize("line", [
        "| `epochs` | integer, 1 to 1000000 | `100` | mutable while suspended |",
        "| `clipRange` | number, above 0 below 1 | `0.0001` | immutable |",
        "| `suspend` | boolean | `false` | mutable |",
        "| `parameters` | map of string, to 1024 characters | `{}` | immutable |",
        "| 83 | `DIVERGED` | yes |",
    ])  # fmt: skip
    def test_says(self, line: str) -> None:
        assert line in reference.document()
