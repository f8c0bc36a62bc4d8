"""A run that is killed at any moment and resumed ends bit for bit like an undisturbed one."""

import numpy as np
import pytest

from tests.kills import Kill, attempt, check_sets, draw_kills, kill_and_resume, make_task, whole_run

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
    task = make_task(tmp_path, method, ranks, seed=SEED, **keys)
    random = np.random.default_rng([SEED, ranks, *map(ord, method)])
    kills = draw_kills(random, task, *whole_run(task), KILLS, outside=1)
    print("kills drawn:", "; ".join(map(str, kills)))  # shown where the test fails
    assert kill_and_resume(task, kills) >= AT_LEAST


def test_kills_in_the_worst_places(tmp_path):
    """Checkpoints at the steps 3, 6, ... 27, epochs end at 9, 18 and 27."""
    task = make_task(tmp_path, "MixBCT", 2)
    whole_run(task)
    kills = [
        Kill("before update", 1, (0, 1)),  # nothing is there yet
        Kill("before replace rank", 1, (1,)),  # the first set, half of it
        Kill("before replace DONE", 3, (0,)),  # the third set without its DONE
        Kill("after replace DONE", 1, (0,)),  # a set is complete, two older ones still there
        Kill("after unlink DONE", 1, (0,)),  # an old set has lost only its DONE
        Kill("after unlink rank", 1, (0,)),  # and DONE and one file
        Kill("before update", 1, (0,)),  # has resumed, and done nothing
        Kill("before replace softmax", 1, (1,)),  # the last model.pt is there, the class centres are older
        Kill("before replace rank", 1, (0,)),  # the last set, half of it
        Kill("after replace DONE", 1, (0, 1)),  # all is written, older sets are not yet deleted
    ]
    assert kill_and_resume(task, kills) == len(kills)


def test_leftovers_of_a_kill_are_deleted_at_the_next_start(tmp_path):
    task = make_task(tmp_path, "MixBCT", 2)
    whole_run(task)

    def half_written():
        return sorted(path.name.partition(".pt")[0] for path in task.output("killed").rglob(".*.tmp"))

    assert not attempt(task, "killed", Kill("half of save", 2, (0,)))
    assert ".rank_0_of_2" in half_written()
    (task.output("killed") / ".prototypes_epoch_1.npy.4711.tmp").write_bytes(b"half")
    assert check_sets(task, "killed") == [3]
    assert not attempt(task, "killed", Kill("before update", 1, (0, 1)), "--resume", "True")
    assert not half_written()
    assert sorted("/".join(path.parts[-2:]) for path in task.output("killed").glob("checkpoints/*/*")) == [
        f"{3 * 4:012}/{file}" for file in ("DONE", "rank_0_of_2.pt", "rank_1_of_2.pt")
    ]
