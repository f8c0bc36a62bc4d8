"""A run that is killed at any moment and resumed ends bit for bit like an undisturbed one."""

import numpy as np
import pytest

from tests.kills import Kill, draw_kills, is_temporary, kill_and_rerun, make_training

SEED = 5
KILLS = 5  # of each run below, in a line of the code; and one from outside
AT_LEAST = 4  # of these six: a run may come to its end before

# Between them: accumulated gradients, sampled centres, dropout, a process that decodes, verification, and checkpoints
# that are not also written at the end of every epoch.
RUNS = [
    ("MixBCT", 1, {"sample_rate": 0.5, "optimizer": "adamw", "lr": 1e-3}),
    ("MixBCT", 2, {"sample_rate": 0.5, "val_targets": ["pairs"], "verbose": 4}),
    ("MixBCT", 3, {"deterministic": True, "batch_size": 2}),
    ("NCCL", 1, {"gradient_acc": 2, "batch_size": 2, "save_all_states": False}),
    ("NCCL", 2, {"checkpoint_steps": 2, "sample_rate": 0.5, "beta": 0.0}),
    ("AdvBCT", 1, {"num_workers": 1, "dropout": 0.2, "checkpoint_steps": 2}),
    ("AdvBCT", 2, {"num_workers": 1, "gradient_acc": 2, "batch_size": 2, "num_epoch": 5}),
]


@pytest.mark.parametrize("method, ranks, keys", RUNS, ids=[f"{method}-{ranks}" for method, ranks, _ in RUNS])
def test_a_killed_run_resumes_bit_for_bit(method, ranks, keys, tmp_path):
    task = make_training(tmp_path, method, ranks, seed=SEED, **keys)
    task.whole_run()
    kills = draw_kills(np.random.default_rng([SEED, ranks, *map(ord, method)]), task, KILLS, outside=1)
    print("kills drawn:", "; ".join(map(str, kills)))  # shown where the test fails
    assert kill_and_rerun(task, kills) >= AT_LEAST


def test_kills_in_the_worst_places(tmp_path):
    """Checkpoints at the steps 3, 6, ... 27, epochs end at 9, 18 and 27."""
    task = make_training(tmp_path, "MixBCT", 2)
    task.whole_run()
    kills = [
        Kill("update", 1, (0, 1)),  # nothing is there yet
        Kill("replace rank", 1, (1,)),  # the first set, half of it
        Kill("replace DONE", 3, (0,)),  # the third set without its DONE
        Kill("unlink DONE", 1, (0,)),  # a set is complete, two older ones still there
        Kill("unlink rank", 1, (0,)),  # an old set has lost only its DONE
        Kill("unlink rank", 2, (0,)),  # and DONE and one file
        Kill("update", 1, (0,)),  # has resumed, and done nothing
        Kill("replace softmax", 1, (1,)),  # the last model.pt is there, the class centres are older
        Kill("replace rank", 1, (0,)),  # the last set, half of it
        Kill("unlink DONE", 1, (0, 1)),  # all is written, older sets are not yet deleted
    ]
    assert kill_and_rerun(task, kills) == len(kills)


def test_leftovers_of_a_kill_are_deleted_at_the_next_start(tmp_path):
    task = make_training(tmp_path, "MixBCT", 2)
    task.whole_run()

    def half_written():
        return sorted(path.name.partition(".pt")[0] for path in task.work.rglob("*") if is_temporary(path))

    assert not task.attempt(Kill("half of save", 2, (0,)))
    assert ".rank_0_of_2" in half_written()
    (task.work / ".prototypes_epoch_1.npy.4711.tmp").write_bytes(b"half")
    assert task.check(task, ended=False) == "sets [3]"
    assert not task.attempt(Kill("update", 1, (0, 1)))
    assert not half_written()
    assert sorted("/".join(path.parts[-2:]) for path in task.work.glob("checkpoints/*/*")) == [
        f"{3 * 4:012}/{file}" for file in ("DONE", "rank_0_of_2.pt", "rank_1_of_2.pt")
    ]
