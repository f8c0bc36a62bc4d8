"""Data workers: errors on a lost file and a dead worker; what they share with their parent; who ends them."""

import errno
import gc
import os
import select
import signal
import subprocess

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dataset import RecordDataset, SyntheticDataset
from engine.loader import ExtractLoader, TrainLoader
from engine.workers import FileSize, WorkerError
from recordio import RecordError
from tests.ranks import run_ranks


@pytest.fixture
def rec(tmp_path, make_record_set):
    return make_record_set(tmp_path, [i % 7 for i in range(60)])


def ended(pid, seconds=10):
    """Whether the process `pid` ends in time."""
    try:
        file = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([file], [], [], seconds)[0])
    finally:
        os.close(file)


def begun(dataset, workers=2):
    """A loader whose workers run: (loader, its iterator after the first batch, the workers)."""
    loader = TrainLoader(dataset, 6, "cpu", workers)
    batches = iter(loader)
    next(batches)
    return loader, batches, loader._workers.processes


@pytest.fixture
def quick(monkeypatch):
    """A waiting DataLoader checks its workers every 0.1 s instead of every 5 s."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("size", [100, 10_000_000])
def test_a_file_that_is_cut_or_overwritten_is_named(rec, workers, size):
    was = rec.stat().st_size
    _, batches, _ = begun(RecordDataset(rec), workers)
    os.truncate(rec, size)
    with pytest.raises(RecordError, match=rf"train\.rec: {size} bytes, but {was} when .* resume = True"):
        list(batches)


class CutWhileRead(RecordDataset):
    """Its file is truncated after the size check."""

    def __init__(self, rec):
        super().__init__(rec)
        self.whole = rec.read_bytes()

    def fill(self, rows, images):
        os.truncate(self.path, 100)
        return super().fill(rows, images)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_cut_while_it_is_read_is_named(rec, quick, workers):
    for start in (0, 30):  # the first records are in a page that still exists in part
        data = CutWhileRead(rec)
        with pytest.raises(RecordError, match=r"train\.rec: 100 bytes, but \d+ when"):
            list(ExtractLoader(data, 6, "cpu", workers, start))
        rec.write_bytes(data.whole)


def test_a_file_that_another_replaced_or_that_was_deleted_is_there_to_the_end(rec, tmp_path):
    expected = [batch.index for batch in TrainLoader(RecordDataset(rec), 6, "cpu", 0)]
    for workers in (0, 1):
        loader, batches, _ = begun(RecordDataset(rec), workers)
        whole = rec.read_bytes()
        (tmp_path / "other").write_bytes(b"shorter")
        os.replace(tmp_path / "other", rec)
        rest = [batch.index for batch in batches]
        rec.unlink()
        again = [batch.index for batch in loader]
        assert all(torch.equal(a, b) for a, b in zip(expected, [expected[0], *rest], strict=True)) and len(again) == 10
        rec.write_bytes(whole)


def test_a_disk_that_is_gone(rec, monkeypatch):
    def stale(_):
        raise OSError(errno.ESTALE, "Stale file handle")

    file = FileSize(rec)
    monkeypatch.setattr("engine.workers.os.stat", stale)
    with pytest.raises(RecordError, match=r"train\.rec: no longer accessible \(Stale file handle\)"):
        file.check()


@pytest.mark.parametrize(
    "number, message",
    [
        (signal.SIGKILL, "killed by SIGKILL.*memory.*lower num_workers = 2"),
        (signal.SIGBUS, "died of SIGBUS.*dmesg.*num_workers = 0"),
        (signal.SIGSEGV, "died of SIGSEGV.*num_workers = 0"),
    ],
)
def test_a_dead_worker_is_reported_with_the_next_batch(rec, number, message):
    before = signal.getsignal(signal.SIGCHLD)
    loader, batches, workers = begun(RecordDataset(rec))
    os.kill(workers[1].pid, number)
    assert ended(workers[1].pid)
    assert signal.getsignal(signal.SIGCHLD) is before  # nothing is raised here, in the middle of a step
    with pytest.raises(WorkerError, match=message):
        list(batches)
    with pytest.raises(WorkerError, match=message):
        next(iter(loader))


def test_a_worker_killed_while_its_batch_is_pending(rec, quick):
    class Killed(RecordDataset):
        def fill(self, rows, images):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerError, match="killed by SIGKILL"):
        list(ExtractLoader(Killed(rec), 6, "cpu", 1))


def test_a_bug_in_a_worker_stays_what_it_is():
    class Broken(SyntheticDataset):
        def fill(self, rows, images):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(ExtractLoader(Broken(num_classes=2, num_image=8), 4, "cpu", 1))


def test_workers_that_cannot_start_are_one_line(rec, monkeypatch):
    def refuse():
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(WorkerError, match=r"num_workers = 2: cannot be started \(.*unavailable\); start fewer"):
        begun(RecordDataset(rec))


def test_nothing_goes_through_dev_shm(rec, monkeypatch):
    """A container has 64 MB of it, and a tensor that a worker cannot send keeps the main process waiting for ever."""

    def refuse(*_):
        os._exit(9)

    for how in ("_share_fd_cpu_", "_share_filename_cpu_", "share_memory_"):
        monkeypatch.setattr(torch.UntypedStorage, how, refuse, raising=False)
    assert len(list(TrainLoader(RecordDataset(rec), 6, "cpu", 1))) == 10


class Session:
    """In a cycle, so that only a collection ends it; notes in which process."""

    def __init__(self, folder):
        self.folder, self.itself = folder, self

    def __del__(self):
        (self.folder / str(os.getpid())).touch()


def test_workers_collect_nothing_of_their_parents(rec, tmp_path, monkeypatch):
    """What waits for a thread in its destructor, as a session of ONNX Runtime's, would wait for ever in a fork."""

    class Collecting(RecordDataset):
        def fill(self, rows, images):
            assert gc.isenabled() and gc.get_freeze_count()
            return super().fill(rows, images)

    def fork(real=os.fork):
        pid = real()
        if pid == 0:
            gc.set_threshold(1)  # where collections are enabled, now
        return pid

    monkeypatch.setattr(os, "fork", fork)
    ended_in, before = tmp_path / "ended_in", gc.get_threshold()
    ended_in.mkdir()
    gc.set_threshold(0)
    try:
        Session(ended_in)
        assert len(list(begun(Collecting(rec))[1])) == 9 and gc.isenabled()
        assert not list(ended_in.iterdir())
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert [path.name for path in ended_in.iterdir()] == [str(os.getpid())]


# --- Whose SIGTERM counts ----------------------------------------------------------------------------------------


def terminate(pids):
    """Send SIGTERM from another process, as a launcher does."""
    subprocess.run(["kill", "-TERM", *map(str, pids)], check=True)


def test_workers_go_on_when_the_launcher_ends_the_run(rec):
    loader, batches, workers = begun(RecordDataset(rec))
    next(batches)  # the second worker's: both have started
    terminate([worker.pid for worker in workers])
    assert len(list(batches)) == 8 and len(list(loader)) == 10
    terminate([worker.pid for worker in workers])
    del loader, batches
    assert all(ended(worker.pid) for worker in workers)
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_workers_end_when_the_training_process_tells_them(rec):
    workers = begun(RecordDataset(rec))[2]
    for worker in workers:
        worker.terminate()
    assert all(ended(worker.pid) for worker in workers)


def _leave_workers_behind(rec, killed):
    loader, _, workers = begun(RecordDataset(rec))
    globals()["kept"] = loader  # alive when the process ends
    np.save(rec.with_name("workers.npy"), [worker.pid for worker in workers])
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)


def test_workers_end_with_the_training_process(rec):
    run_ranks(_leave_workers_behind, 1, rec, False)
    assert all(ended(pid) for pid in np.load(rec.with_name("workers.npy")))


def test_workers_end_when_the_training_process_was_killed(rec):
    with pytest.raises(RuntimeError, match="exit code -9"):
        run_ranks(_leave_workers_behind, 1, rec, True)
    assert all(ended(pid) for pid in np.load(rec.with_name("workers.npy")))
