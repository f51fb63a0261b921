"""The rules across fields, in Python; and which fields may change."""

import pytest

from tempflow_api.rules import (
    FIELD_MUTABILITY,
    RULES,
    Mutability,
    Rule,
    broken_rules,
    changed_fields,
    mutability_of,
)
from tempflow_api.v1alpha1 import JobSpec, TempFlowGRPOJob
from tests.unit.api.field_changes import ALONE, LEAVES, OTHER, another, value_of, with_value
from tests.unit.api.rule_breakers import BREAKERS, VALID, Breaker, rule_of


def spec_of(manifest: dict[str, object]) -> JobSpec:
    return TempFlowGRPOJob.model_validate(manifest).spec


def test_the_valid_manifest_keeps_all() -> None:
    assert broken_rules(spec_of(VALID)) == []


@pytest.mark.parametrize("breaker", BREAKERS, ids=lambda breaker: breaker.name)
def test_each_breaker_breaks_its_rule_and_no_other(breaker: Breaker) -> None:
    broken = broken_rules(spec_of(breaker.manifest()))
    assert rule_of(breaker) in broken
    assert {RULES.index(rule) for rule in broken} == {breaker.rule}


def test_each_rule_has_a_breaker() -> None:
    assert {breaker.rule for breaker in BREAKERS} == set(range(len(RULES)))


def test_a_flow_grpo_job_is_valid() -> None:
    job = Breaker(
        "",
        0,
        {
            "algorithm.method": "flow-grpo",
            "algorithm.branchesPerSeed": 1,
            "algorithm.seedsPerPrompt": 24,
            "algorithm.advantage": {"scope": "prompt"},
        },
    )
    assert broken_rules(spec_of(job.manifest())) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.message[:30])
def test_each_rule_points_at_a_field(rule: Rule) -> None:
    path = rule.path.split(".")
    schema = TempFlowGRPOJob.model_json_schema()
    node = schema
    for name in path:
        node = node["properties"][name]
        while "$ref" in node or "anyOf" in node:
            node = node["anyOf"][0] if "anyOf" in node else node
            if "$ref" in node:
                node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    assert node


class TestMutability:
    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            ("spec.model.lora.rank", Mutability.IMMUTABLE),
            ("spec.algorithm.epochs", Mutability.WHILE_SUSPENDED),
            ("spec.compute.nodes", Mutability.WHILE_SUSPENDED),
            ("spec.computers", Mutability.IMMUTABLE),
            ("spec.runPolicy.suspend", Mutability.MUTABLE),
            ("spec.rewards[0].weight", Mutability.IMMUTABLE),
        ],
    )
    def test_of_a_field(self, path: str, expected: Mutability) -> None:
        assert mutability_of(path) is expected

    @pytest.mark.parametrize("path", ALONE)
    def test_a_field_that_changes_alone_keeps_the_rules(self, path: str) -> None:
        """Of the table of changes that the cluster tests send to the API server."""
        spec = spec_of(VALID).model_dump(mode="json", by_alias=True, exclude_none=True)
        job = {**VALID, "spec": spec | {"checkpoint": {"uri": "s3://bucket/runs"}}}
        old = value_of(job, path)
        new = another(path, LEAVES[path], old)
        assert new != old
        assert broken_rules(spec_of(with_value(job, path, new))) == []

    def test_a_field_that_cannot_change_alone_is_immutable(self) -> None:
        assert {mutability_of(f"spec.{path}") for path, new in OTHER.items() if new is None} == {
            Mutability.IMMUTABLE
        }

    def test_the_table_names_fields(self) -> None:
        named = spec_of(VALID).model_dump(by_alias=True)
        for path in FIELD_MUTABILITY:
            node: object = {"spec": named}
            for part in path.split("."):
                assert isinstance(node, dict)
                assert part in node, path
                node = node[part]


class TestChangedFields:
    def test_none(self) -> None:
        assert changed_fields(spec_of(VALID), spec_of(VALID)) == []

    def test_by_path(self) -> None:
        fields = {
            "algorithm.seedsPerPrompt": 3,
            "rewards": [{"name": "digit-ink", "weight": 2.0}],
            "model.tuning": "full",
            "model.lora": None,
        }
        assert changed_fields(spec_of(VALID), spec_of(Breaker("", 0, fields).manifest())) == [
            "spec.algorithm.seedsPerPrompt",
            "spec.model.lora",
            "spec.model.tuning",
            "spec.rewards",
        ]

    def test_a_default_that_is_written_out_is_no_change(self) -> None:
        fields = {"optimizer": {"beta1": 0.9}}
        assert changed_fields(spec_of(VALID), spec_of(Breaker("", 0, fields).manifest())) == []
