"""What a store can do to a save, and to what reads it: every request is broken in this process."""

import os
import threading
import time
from pathlib import Path

import boto3
import pytest
from s3fs import S3FileSystem

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import CheckpointCorrupt, Fenced, StoreUnavailable, Uncommitted
from tempflow_trainer.checkpoint import Checkpoints
from tempflow_trainer.saving import Save, Saver
from tempflow_trainer.store import S3Store
from tests.faults import writer
from tests.faults.conftest import BUCKET, KEYS
from tests.faults.s3_proxy import Fault, Proxy, Seen
from tests.faults.seaweedfs import seaweedfs

pytestmark = pytest.mark.faults

BOTH = pytest.mark.parametrize("s3", ["moto", "seaweed"], indirect=True)
"""Servers of two makers."""

MIB = 1 << 20


@pytest.fixture
def run(s3: Proxy, uri: str, tmp_path: Path) -> Checkpoints:
    """A run with the checkpoints of steps 1 and 2."""
    made = writer.start(s3.endpoint, uri, tmp_path / "one")
    for step in (1, 2):
        made.save(writer.state(step), writer.export)
    s3.clear()
    return made


def committed(run: Checkpoints) -> list[int]:
    return [folder.step for folder in run.committed()]


def save(run: Checkpoints, step: int) -> str:
    return run.save(writer.state(step), writer.export)


def operations(s3: Proxy) -> list[str]:
    return [request.operation for request in s3.log]


@BOTH
class TestReplies:
    @pytest.mark.parametrize("key", [layout.MANIFEST, layout.LEDGER], ids=["manifest", "entry"])
    def test_lost_after_the_write_is_not_a_lost_race(
        self, s3: Proxy, run: Checkpoints, key: str
    ) -> None:
        s3.add(Fault(operation="PutObject", key=key, times=1, lose_reply=True))
        save(run, 3)
        assert committed(run) == [3, 2]
        assert [str(r) for r in s3.log if r.operation == "PutObject" and key in r.key][1:], "again"

    @pytest.mark.parametrize("key", [layout.MANIFEST, layout.LEDGER], ids=["manifest", "entry"])
    def test_a_conflict_is_tried_again(self, s3: Proxy, run: Checkpoints, key: str) -> None:
        s3.add(Fault("PutObject", key=key, times=2, status=409, code="ConditionalRequestConflict"))
        save(run, 3)
        assert committed(run) == [3, 2]

    def test_an_entry_that_was_written_after_all_is_taken_up(
        self, s3: Proxy, run: Checkpoints
    ) -> None:
        """The save failed, as far as anybody here could tell; the store thinks otherwise."""
        s3.add(Fault("PutObject", key=layout.LEDGER, times=1, lose_reply=True))
        s3.add(Fault("PutObject|GetObject|ListObjects", key=layout.LEDGER, skip=2, status=403))
        with pytest.raises(StoreUnavailable):
            save(run, 3)
        s3.clear()
        assert committed(run) == [3, 2]
        save(run, 4)
        assert committed(run) == [4, 3]


class TestTime:
    def test_slow_down_for_a_while(self, s3: Proxy, run: Checkpoints) -> None:
        s3.add(Fault("PutObject", times=3, status=503, code="SlowDown"))
        save(run, 3)
        assert committed(run) == [3, 2]

    def test_slow_down_for_longer_than_a_client_repeats(
        self, s3: Proxy, run: Checkpoints, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(S3FileSystem, "retries", 1)  # times those of botocore
        storm = s3.add(Fault("PutObject", times=6, status=503, code="SlowDown"))
        save(run, 3)
        assert committed(run) == [3, 2]
        assert storm.seen > storm.times

    @pytest.mark.parametrize("code", ["SlowDown", "InternalError"])
    def test_slow_down_for_ever_ends_by_the_deadline(
        self, s3: Proxy, run: Checkpoints, code: str
    ) -> None:
        s3.add(Fault("PutObject", status=503, code=code))
        run.save_seconds = 3
        start = time.monotonic()
        with pytest.raises(StoreUnavailable, match="overloaded or slow: see that it runs"):
            save(run, 3)
        assert time.monotonic() - start < 10
        s3.clear()
        assert committed(run) == [2, 1]

    def test_a_store_that_hangs_ends_by_the_deadline(self, s3: Proxy, run: Checkpoints) -> None:
        released = threading.Event()

        def hang(_seen: Seen) -> None:
            released.wait(20)

        s3.add(Fault("PutObject", times=1, before=hang))
        run.save_seconds = 2
        with pytest.raises(StoreUnavailable, match="it took longer than it may"):
            save(run, 3)
        released.set()
        s3.clear()
        run.save_seconds = 60
        save(run, 3)
        assert committed(run) == [3, 2]


class TestRefusalsOfOneMaker:
    """SeaweedFS makes a bucket when somebody writes to it, and checks signatures, so that no header
    can be taken out on the way."""

    def test_a_missing_bucket_is_not_created(self, s3: Proxy) -> None:
        store = S3Store("s3://not-there/run", endpoint_url=s3.endpoint, region="us-east-1")
        with pytest.raises(StoreUnavailable, match="check that the bucket exists"):
            store.probe()
        assert "CreateBucket" not in operations(s3)

    def test_a_store_that_overwrites_is_refused(self, s3: Proxy, uri: str) -> None:
        s3.add(Fault(strip="If-None-Match"))
        store = writer.store(s3.endpoint, uri)
        with pytest.raises(StoreUnavailable, match="it ignores If-None-Match"):
            store.probe()


@BOTH
class TestRefusals:
    def test_one_file_of_many(self, s3: Proxy, run: Checkpoints) -> None:
        s3.add(Fault("PutObject", key="optimizer", status=403, code="AccessDenied"))
        with pytest.raises(StoreUnavailable, match=r"cannot write s3://.*optimizer\.safetensors"):
            save(run, 3)
        written = [r.key for r in s3.log if r.operation == "PutObject"]
        assert not [key for key in written if layout.MANIFEST in key or layout.LEDGER in key]
        s3.clear()
        assert committed(run) == [2, 1]
        left = run.store.find(f"{layout.CHECKPOINTS}/{layout.folder_name(3, 1)}")
        assert left == {}, "what had been sent is removed"

    @pytest.mark.parametrize(
        ("code", "said"),
        [
            ("AccessDenied", "the credentials allow it"),
            ("ExpiredToken", "the credentials have expired: renew them"),
            ("RequestTimeTooSkewed", "this machine's clock differs too much"),
        ],
    )
    def test_everything_at_the_start(self, s3: Proxy, uri: str, code: str, said: str) -> None:
        s3.add(Fault(status=403, code=code))
        store = writer.store(s3.endpoint, uri)
        with pytest.raises(StoreUnavailable, match=said):
            store.probe()
        assert len(s3.log) == 1, "what is refused for good is not asked again and again"

    def test_a_store_without_uploads_in_parts_is_refused(self, s3: Proxy, uri: str) -> None:
        s3.add(Fault("CreateMultipartUpload", status=501, code="NotImplemented"))
        store = writer.store(s3.endpoint, uri)
        with pytest.raises(StoreUnavailable, match="cannot write in parts"):
            store.probe()
        s3.clear()
        assert store.find("") == {}

    def test_deleting(self, s3: Proxy, run: Checkpoints) -> None:
        """What cannot be deleted does not count all the same, and the run goes on."""
        s3.add(Fault("DeleteObject.*", status=403, code="AccessDenied"))
        for step in (3, 4):
            save(run, step)
        assert committed(run) == [4, 3]
        s3.clear()
        names = {key.split("/")[1] for key in run.store.find(layout.CHECKPOINTS)}
        assert len(names) == 4


@BOTH
class TestLargeFiles:
    @pytest.fixture
    def large(self, tmp_path: Path) -> Path:
        """It travels in three parts."""
        path = tmp_path / "large"
        path.write_bytes(os.urandom(1 << 10) * (33 << 10))
        return path

    def test_a_part_that_breaks_is_sent_again(
        self, s3: Proxy, run: Checkpoints, large: Path, tmp_path: Path
    ) -> None:
        s3.add(Fault("UploadPart", times=2, reset_after=MIB))
        run.store.put(large, "large")
        run.store.get("large", tmp_path / "back", large.stat().st_size)
        assert (tmp_path / "back").read_bytes() == large.read_bytes()

    def test_a_part_that_always_breaks_ends_by_the_deadline(
        self, s3: Proxy, run: Checkpoints, large: Path
    ) -> None:
        s3.add(Fault("UploadPart", reset_after=MIB))
        with pytest.raises(StoreUnavailable, match="cannot write"):
            run.store.within(5).put(large, "large")
        assert {"CreateMultipartUpload", "AbortUpload"} <= {*operations(s3)}
        s3.clear()
        assert run.store.find("large") == {}
        client = boto3.client("s3", endpoint_url=s3.endpoint)
        assert not client.list_multipart_uploads(Bucket=BUCKET).get("Uploads"), "nothing is billed"

    def test_completing_that_is_lost(self, s3: Proxy, run: Checkpoints, large: Path) -> None:
        s3.add(Fault("CompleteMultipartUpload", times=1, lose_reply=True))
        run.store.put(large, "large")
        assert run.store.find("large") == {"large": large.stat().st_size}


@BOTH
class TestReading:
    def test_a_reply_that_breaks_off_is_read_again(self, s3: Proxy, run: Checkpoints) -> None:
        s3.add(Fault("GetObject", key="trained", times=1, cut_reply=20))
        newest = run.newest_sound()
        assert newest is not None
        assert run.load(newest).epochs_done == 2

    def test_a_bit_that_flips_is_noticed(self, s3: Proxy, run: Checkpoints) -> None:
        s3.add(
            Fault("GetObject", key=rf"{layout.folder_name(2, 1)}/state/trained", flip_reply=True)
        )
        assert run.newest_sound() == f"{layout.CHECKPOINTS}/{layout.folder_name(1, 1)}"

    def test_when_all_are_damaged_nothing_starts_from_zero(
        self, s3: Proxy, uri: str, run: Checkpoints, tmp_path: Path
    ) -> None:
        del run
        s3.add(Fault("GetObject", key="state/trained", flip_reply=True))
        with pytest.raises(CheckpointCorrupt, match="none of the newest 2 checkpoints"):
            writer.start(s3.endpoint, uri, tmp_path / "two")
        s3.clear()
        assert writer.start(s3.endpoint, uri, tmp_path / "two").parent == layout.folder_name(2, 1)

    def test_what_another_machine_added_is_seen_at_once(
        self, s3: Proxy, run: Checkpoints, uri: str
    ) -> None:
        reader = S3Store(uri, endpoint_url=s3.endpoint, region="us-east-1")  # its own client
        before = reader.find(layout.CHECKPOINTS)
        folder = save(run, 3)
        assert f"{folder}/{layout.MANIFEST}" in reader.find(layout.CHECKPOINTS).keys() - before

    def test_one_that_is_deleted_while_it_is_read(
        self, s3: Proxy, uri: str, run: Checkpoints, tmp_path: Path
    ) -> None:
        """An older start is alive and lets go of what the newer one is about to continue from."""
        done = threading.Event()

        def go_on(_seen: object) -> None:
            if not done.is_set():
                done.set()
                for step in (3, 4):
                    save(run, step)

        s3.add(Fault("GetObject", key=r"000002-.*state/trained", times=1, before=go_on))
        newer = writer.start(s3.endpoint, uri, tmp_path / "two")
        assert newer.parent == layout.folder_name(4, 1)
        with pytest.raises(Fenced):
            save(run, 5)


def test_a_checkpoint_is_there_after_its_server_was_killed(
    s3_environment: None, uri: str, tmp_path: Path
) -> None:
    """SeaweedFS, which keeps its data on disk: on a machine that lives on, nothing is lost."""
    del s3_environment
    with seaweedfs(tmp_path, KEYS, BUCKET) as endpoint:
        save(writer.start(endpoint, uri, tmp_path / "one"), 1)
    with seaweedfs(tmp_path, KEYS, BUCKET) as endpoint:
        found = writer.start(endpoint, uri, tmp_path / "two")
        assert found.parent == layout.folder_name(1, 1)
        assert found.load(f"{layout.CHECKPOINTS}/{found.parent}").epochs_done == 1


@BOTH
class TestStarts:
    def test_two_at_once_never_own_the_run_both(self, s3: Proxy, uri: str, tmp_path: Path) -> None:
        made: list[Checkpoints] = []
        threads = [
            threading.Thread(
                target=lambda n=n: made.append(
                    writer.start(s3.endpoint, uri, tmp_path / f"start-{n}")
                )
            )
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        owners = sorted(start.ledger.newest.owner for start in made if start.ledger)
        assert [owner.number for owner in owners] == [1, 2, 3, 4]
        ended = []
        for start in made:
            try:
                save(start, 1)
            except Fenced:
                ended.append(start)
        assert len(ended) == 3

    def test_a_late_pod_of_an_older_attempt_is_turned_away(
        self, s3: Proxy, uri: str, tmp_path: Path
    ) -> None:
        writer.start(s3.endpoint, uri, tmp_path / "two", attempt=2)
        with pytest.raises(Fenced, match="belongs to start 1 of attempt 2"):
            writer.start(s3.endpoint, uri, tmp_path / "one", attempt=1)


class TestBesideTraining:
    def offer(self, saver: Saver, step: int) -> bool:
        """What a session does when a save is due."""
        ready = saver.ready(step)
        if ready:
            saver.begin(writer.state(step), writer.export, {})
        return ready

    def saver(self, run: Checkpoints, ended: list[Save], wait_seconds: float = 20) -> Saver:
        return Saver(
            run,
            wait_seconds=wait_seconds,
            most_failures=3,
            on_end=ended.append,
            write=lambda _line: None,
            after=lambda: None,
        )

    def test_training_does_not_wait_for_the_store(self, s3: Proxy, run: Checkpoints) -> None:
        s3.add(Fault("PutObject", delay_seconds=0.3))
        ended: list[Save] = []
        saver = self.saver(run, ended)
        start = time.monotonic()
        assert self.offer(saver, 3)
        assert time.monotonic() - start < 0.3
        assert not saver.settle(0)
        assert saver.settle(20)
        assert [(s.step, s.error) for s in ended] == [(3, None)]
        assert ended[0].send_seconds > 8 * 0.3 > ended[0].stall_seconds
        assert ended[0].bytes > 0
        assert committed(run) == [3, 2]

    def test_one_is_in_flight_and_the_next_waits_or_is_skipped(
        self, s3: Proxy, run: Checkpoints
    ) -> None:
        s3.add(Fault("PutObject", delay_seconds=0.3))
        ended: list[Save] = []
        saver = self.saver(run, ended, wait_seconds=0.1)
        assert self.offer(saver, 3)
        assert not self.offer(saver, 4), "skipped"
        assert saver.settle(20)
        assert self.offer(saver, 5)
        assert saver.settle(20)
        assert [s.step for s in ended] == [3, 5]
        assert committed(run) == [5, 3]

    def test_failures_are_counted_and_the_third_in_a_row_ends_the_run(
        self, s3: Proxy, run: Checkpoints
    ) -> None:
        denied = Fault("PutObject", status=403, code="AccessDenied")
        ended: list[Save] = []
        saver = self.saver(run, ended)
        for faults in ([denied], [denied], [], [denied], [denied]):
            s3.clear()
            for fault in faults:
                s3.add(fault)
            self.offer(saver, 3 + len(ended))
            assert saver.settle(20)
        assert [s.error is None for s in ended] == [False, False, True, False, False]
        self.offer(saver, 9)
        with pytest.raises(Uncommitted, match="3 checkpoints in a row could not be stored"):
            saver.settle(20)
