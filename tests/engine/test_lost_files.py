"""A data file lost during a run: the error names it, and the last checkpoint can be resumed."""

import os

import pytest
import torch

from BCT_methods.L2.train import L2
from engine.workers import WorkerError
from old_model.feature_set import FeatureError
from recordio import RecordError
from tests.BCT_methods.whole_runs import sets_of, train, write_config, write_old_features

KEYS = {"batch_size": 6, "num_epoch": 1, "checkpoint_steps": 4}  # 10 steps


class LosesFile(L2):
    """After 5 of 10 steps the file `lost` is truncated."""

    lost = None

    def losses(self, batch):
        if self.step == 5:
            os.truncate(self.lost, 1000)
        return super().losses(batch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_record_set):
    folder, labels = tmp_path_factory.mktemp("lost"), [i % 5 for i in range(60)]
    make_record_set(folder / "set.rec", labels)
    write_old_features(folder, labels)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """The result of an undisturbed run."""
    return train(L2, write_config(folder, "L2", "whole", **{**KEYS, "checkpoint_steps": 0}))


@pytest.mark.parametrize(
    "name, workers, error",
    [("set.rec", 0, RecordError), ("set.rec", 1, RecordError), ("old_feature.npy", 1, FeatureError)],
)
def test_a_lost_file_is_named_and_the_run_resumes_once_it_is_back(folder, whole, name, workers, error):
    path = write_config(folder, "L2", f"{name[:3]}_{workers}", **KEYS, num_workers=workers)
    content = (folder / name).read_bytes()
    with pytest.raises(error, match=name.replace(".", r"\.")):
        train(type("Loses", (LosesFile,), {"lost": folder / name}), path)
    (folder / name).write_bytes(content)
    assert [step for step, _ in sets_of(folder / path.stem)] in ([4], [4, 8])
    rest = train(L2, path, "--resume", "True")
    assert torch.equal(whole[1], rest[1]) and all(torch.equal(whole[0][key], rest[0][key]) for key in whole[0])


class LosesWorker(L2):
    def losses(self, batch):
        if self.step == 5:
            for process in self.loader._workers.processes:
                process.kill()
                process.join()
        return super().losses(batch)


def test_a_dead_worker_ends_the_run_between_two_steps(folder):
    path = write_config(folder, "L2", "run", **{**KEYS, "checkpoint_steps": 2}, num_workers=2)
    with pytest.raises(WorkerError, match="killed by SIGKILL"):
        train(LosesWorker, path)
    assert [step for step, _ in sets_of(folder / "run")] == [4, 6]
