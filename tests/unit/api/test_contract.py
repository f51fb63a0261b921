"""Names, conditions, checkpoint folders and errors that several parts rely on."""

from collections.abc import Sequence

import pytest
from pydantic import ValidationError

from tempflow_api import checkpoint_layout, naming
from tempflow_api.conditions import ConditionType, Reason, find, is_true, set_condition
from tempflow_api.errors import PERMANENT, ExitCode, ManifestInvalid, Problem, TempFlowError
from tempflow_api.status import Condition, Progress
from tempflow_api.v1alpha1 import JobSpec, TempFlowGRPOJob
from tests.unit.api.rule_breakers import VALID


def test_every_field_of_a_job_is_described() -> None:
    """Sections say it themselves; their fields have a ``$ref`` to them."""
    schema = JobSpec.model_json_schema()
    blocks = {"JobSpec": schema, **schema["$defs"]}
    lacking = [
        f"{block}.{name}"
        for block, described in blocks.items()
        for name, field in described.get("properties", {}).items()
        if "description" not in field and "$ref" not in field
    ]
    assert lacking == []


class TestCheckpointFolders:
    @pytest.mark.parametrize("parts", [(0, 0, 1, 1), (120, 3, 1, 1), (7, 0, 2, 1), (7, 0, 12, 3)])
    def test_round_trip(self, parts: tuple[int, int, int, int]) -> None:
        assert checkpoint_layout.parse_folder(checkpoint_layout.folder_name(*parts)) == parts

    def test_names_sort_as_steps_do(self) -> None:
        names = [checkpoint_layout.folder_name(step, 0) for step in (9, 10, 100)]
        assert names == sorted(names)

    @pytest.mark.parametrize("name", ["", "step-1-attempt-0", "step-0000000001", "other"])
    def test_other_names(self, name: str) -> None:
        assert checkpoint_layout.parse_folder(name) is None


class TestWhatCounts:
    def entry(self, *committed: str) -> checkpoint_layout.Entry:
        return checkpoint_layout.Entry(
            number=3,
            action="commit",
            attempt=1,
            incarnation=2,
            nonce="n",
            time="2026-01-31T12:00:00Z",
            committed=list(committed),
        )

    def test_the_highest_entry_is_found_among_other_names(self) -> None:
        keys = [checkpoint_layout.entry_key(number) for number in (2, 10, 9)]
        assert checkpoint_layout.newest_entry([*keys, "ledger/notes", "ledger/11.json"]) == 10
        assert checkpoint_layout.newest_entry([]) is None

    def test_it_is_what_the_highest_entry_lists_and_what_is_there(self) -> None:
        name = checkpoint_layout.folder_name
        there = [name(3, 1), name(4, 1), name(5, 1), "notes"]
        entry = self.entry(name(4, 1), name(3, 1), name(2, 1))
        found = checkpoint_layout.committed(there, entry)
        assert [folder.name for folder in found] == [name(4, 1), name(3, 1)]

    def test_without_a_ledger_every_complete_one_counts(self) -> None:
        name = checkpoint_layout.folder_name
        found = checkpoint_layout.committed([name(3, 1), name(10, 1), name(10, 2)], None)
        assert [folder.name for folder in found] == [name(10, 2), name(10, 1), name(3, 1)]


class TestNames:
    def test_the_longest_job_fits_into_a_label_of_dns(self) -> None:
        host = naming.rank_zero_host("d" * 45, 1000, "ns").split(".")[0]
        assert len(host) <= 63

    def test_a_run_on_a_cluster_is_told_apart_by_its_uid(self) -> None:
        assert naming.run_folder("team", "demo", "0123456789") == "team/demo-01234567"
        assert naming.run_folder(None, "demo", None) == "demo"


class TestConditions:
    def running(
        self, before: Sequence[Condition], status: bool | None, now: str
    ) -> tuple[list[Condition], str]:
        """The conditions with Running set, and the time of its last transition."""
        kind = ConditionType.RUNNING
        after = set_condition(before, kind, status, Reason.PODS_RUNNING, now=now, generation=1)
        condition = find(after, kind)
        assert condition is not None
        return after, condition.last_transition_time

    def test_the_transition_time_moves_with_the_status_only(self) -> None:
        first, second, third = (f"2026-01-31T12:00:0{n}Z" for n in (1, 2, 3))
        conditions, time = self.running([], True, first)
        assert (time, is_true(conditions, ConditionType.RUNNING)) == (first, True)
        conditions, time = self.running(conditions, True, second)
        assert time == first
        conditions, time = self.running(conditions, None, third)
        assert (time, is_true(conditions, ConditionType.RUNNING)) == (third, False)
        assert len(conditions) == 1


class TestErrors:
    def subclasses(self, kind: type[TempFlowError]) -> list[type[TempFlowError]]:
        return [kind, *(found for sub in kind.__subclasses__() for found in self.subclasses(sub))]

    def test_none_but_the_root_is_a_bug(self) -> None:
        codes = [k.exit_code for k in self.subclasses(TempFlowError) if k is not TempFlowError]
        assert ExitCode.BUG not in codes
        assert ExitCode.DONE not in codes

    def test_what_may_pass_is_not_permanent(self) -> None:
        assert not PERMANENT & {ExitCode.BUG, ExitCode.PREEMPTED, ExitCode.RANK_DIED}

    def test_a_line_a_problem(self) -> None:
        error = ManifestInvalid("job.yaml", [Problem("spec.a", "x", 3), Problem("spec.b", "y")])
        assert str(error) == "job.yaml:3: spec.a: x\njob.yaml: spec.b: y"


class TestModels:
    def test_snake_case_is_for_python_only(self) -> None:
        job = TempFlowGRPOJob.model_validate(VALID)
        assert "promptsPerEpoch" in job.model_dump_json(by_alias=True)

    def test_a_job_survives_json(self) -> None:
        job = TempFlowGRPOJob.model_validate(VALID)
        assert TempFlowGRPOJob.model_validate_json(job.model_dump_json(by_alias=True)) == job

    def test_a_spec_refuses_what_it_does_not_know_and_status_does_not(self) -> None:
        with pytest.raises(ValidationError):
            TempFlowGRPOJob.model_validate({**VALID, "extra": 1})
        progress = Progress.model_validate(
            {
                "epoch": 1,
                "epochs": 2,
                "phase": "update",
                "time": "2026-01-31T12:00:00Z",
                "fromALaterVersion": 1,
            }
        )
        assert progress.epoch == 1
