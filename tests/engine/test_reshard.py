"""A run resumed on another number of ranks: the class shards are resharded, everything else carries over."""

import copy

import pytest
import torch

from BCT_methods.AdvBCT.train import AdvBCT
from BCT_methods.MixBCT.train import MixBCT
from BCT_methods.NCCL.train import NCCL
from core.config import load_config
from core.distributed import rows_of_rank
from engine.checkpoint import complete_sets, load, reshard
from tests.BCT_methods.whole_runs import sets_of, train, without_batch_norm, write_config, write_old_features
from tests.ranks import run_ranks

METHODS = {"MixBCT": MixBCT, "NCCL": NCCL, "AdvBCT": AdvBCT}
CLASSES, GLOBAL_BATCH, STOPPED, STEPS = 7, 12, 4, 8  # 7 classes: the shards of 2, 3 and 4 ranks are of unequal size


# --- the shards ----------------------------------------------------------------------------------------------------


def states_of(ranks, total=CLASSES):
    """States as in checkpoints, of `total` classes; every value of a class is its number."""
    states = []
    for rank in range(ranks):
        classes = torch.arange(*rows_of_rank(total, rank, ranks), dtype=torch.float32)
        states.append(
            {
                "classifier": {"weight": classes[:, None].expand(-1, 3).clone()},
                "extra": {"queue.logits": classes.expand(2, -1).clone(), "queue.size": torch.tensor(5)},
                "optimizer": {"state": {0: {"m": torch.ones(2)}, 1: {"m": 10 * classes, "step": torch.tensor(4.0)}}},
                "class_sharded": [
                    (("classifier", "weight"), 0),
                    (("extra", "queue.logits"), 1),
                    (("optimizer", "state", 1, "m"), 0),
                ],
                "random": rank,
                "sampling": rank,
            }
        )
    return states


@pytest.mark.parametrize("before", [1, 2, 3, 8])
@pytest.mark.parametrize("after", [1, 2, 4, 8])
def test_resharding_gives_each_rank_its_classes(before, after):
    old, expected = states_of(before), states_of(after)
    untouched = copy.deepcopy(old)
    for rank in range(after):
        state = reshard(old, rank, after)
        for path, _ in state["class_sharded"]:
            value, right = state, expected[rank]
            for key in path:
                value, right = value[key], right[key]
            assert torch.equal(value, right), path
        assert state["extra"]["queue.size"] == 5 and state["optimizer"]["state"][1]["step"] == 4
        # No two ranks continue with the same random numbers.
        assert (state["random"], state["sampling"]) == ((rank, rank) if rank < before else (None, None))
    for state, was in zip(old, untouched):
        assert str(state) == str(was)


# --- a run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_record_set):
    folder, labels = tmp_path_factory.mktemp("reshard"), [i % CLASSES for i in range(4 * GLOBAL_BATCH)]
    make_record_set(folder / "set.rec", labels)
    write_old_features(folder, labels)
    return folder


def config_of(folder, method, ranks, name, **keys):
    own = {"NCCL": {"queue_size": 20}, "MixBCT": {"mix_ratio": 1.0}}.get(method, {})  # all mixed: no draw per rank
    return write_config(
        folder,
        method,
        name,
        batch_size=GLOBAL_BATCH // ranks,
        decay_epoch=[2],
        clip_grad_norm=0.0,
        **{"checkpoint_steps": STOPPED, **own, **keys},
    )


def stopped_run(method, path):
    """Train to the end and keep only the checkpoint of step STOPPED, as if the run had been killed after it."""
    train(METHODS[method], path)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (complete_sets(load_config(path).output)[-1] / "DONE").unlink()
    torch.distributed.barrier()


def resumed(method, path, *overrides):
    """This rank's state right after resuming, and at the end."""
    torch.set_num_threads(1)
    kind = type("Watched", (METHODS[method],), {"build_backbone": lambda self: without_batch_norm()})
    trainer = kind(load_config(path, ["--resume", "True", *overrides]))
    at_start = {}

    def keep(self):
        at_start.update(
            step=self.step,
            lr=self.schedule.get_last_lr()[0],
            centres=self.classifier.weight.detach().clone(),
            momentum=self.optimizer.state[self.classifier.weight]["momentum_buffer"].clone(),
            extra={key: value.clone() for key, value in self.extra.state_dict().items()},
            random=self.generator.get_state(),
        )

    restore = trainer.resume
    trainer.resume = lambda: (restore(), keep(trainer))
    trainer.train()
    backbone = {k.removeprefix("module."): v.clone() for k, v in trainer.backbone.state_dict().items()}
    return at_start, (backbone, trainer.classifier.weight.detach().clone(), dict(trainer.extra.state_dict()))


@pytest.mark.parametrize(
    "method, before, after, keys",
    [
        *((method, *ranks, {}) for method in METHODS for ranks in ((2, 1), (1, 3), (2, 4))),
        ("NCCL", 2, 3, {"alpha": 8.0, "beta": 0.0}),  # its queue has no logits
    ],
)
def test_a_run_resumed_on_other_ranks_ends_like_the_whole_run(folder, method, before, after, keys):
    name = f"{method}_{before}_{after}"
    path = config_of(folder, method, before, name, **keys)
    run_ranks(stopped_run, before, method, path)
    assert sets_of(folder / name) == [(STOPPED, before)]
    states = [load(complete_sets(folder / name)[0] / f"rank_{r}_of_{before}.pt") for r in range(before)]
    results = run_ranks(resumed, after, method, config_of(folder, method, after, name, **keys))

    weight = states[0]["optimizer"]["param_groups"][1]["params"][0]
    for key, whole in (
        ("centres", [state["classifier"]["weight"] for state in states]),
        ("momentum", [state["optimizer"]["state"][weight]["momentum_buffer"] for state in states]),
    ):
        assert torch.equal(torch.cat([start[key] for start, _ in results]), torch.cat(whole)), key
    for rank, (start, _) in enumerate(results):
        assert start["step"] == STOPPED and start["lr"] == results[0][0]["lr"]
        if rank < before:
            assert torch.equal(start["random"], states[rank]["random"]["run"])
        for key, value in states[0]["extra"].items():
            if not key.endswith("queue_logits"):
                assert torch.equal(start["extra"][key], value), key
    draws = [start["random"].tolist() for start, _ in results]
    assert all(first != second for i, first in enumerate(draws) for second in draws[:i])

    # And ends, up to rounding, like the undisturbed run.
    undisturbed = run_ranks(train_method, 1, method, config_of(folder, method, 1, f"{name}_whole", **keys))[0]
    for _, (backbone, _, _) in results:
        for key, value in undisturbed[0].items():
            torch.testing.assert_close(backbone[key], value, rtol=0, atol=1e-5)
    centres = torch.cat([end[1] for _, end in results])
    torch.testing.assert_close(centres, undisturbed[1], rtol=0, atol=1e-5)
    # The newest set is that of the ranks which wrote it; the last two of the run are kept, whoever wrote them.
    assert sets_of(folder / name) == [(STOPPED, before), (STEPS, after)]
    assert len(list((folder / name).glob("softmax_fc_gpu_*.pt"))) == after


def train_method(method, path):
    return train(METHODS[method], path)


@pytest.mark.parametrize(
    "stopped, step",
    [
        (STOPPED, 2),  # the end of the first epoch, of 4 steps of 12 images, now of 2 steps of 24
        (7, 4),  # rounded up to the end of the second: nothing is left but to save
    ],
)
def test_another_global_batch_resumes_at_the_same_image_with_a_warning(folder, stopped, step):
    name = f"larger_{stopped}"
    path = config_of(folder, "MixBCT", 2, name, checkpoint_steps=stopped)
    run_ranks(stopped_run, 2, "MixBCT", path)
    keys = ["--batch_size", "12"]  # two ranks of 6 become two of 12 images, which is refused, or one of 24
    with pytest.raises(RuntimeError, match="CheckpointError.*written with batch_size = 6 and gradient_acc = 1"):
        run_ranks(resumed, 2, "MixBCT", path, *keys)
    ((start, _),) = run_ranks(resumed, 1, "MixBCT", path, "--batch_size", "24")
    assert start["step"] == step
    log = (folder / name / "training.log").read_text()
    assert "written by 2 ranks with a global batch of 12 images, this run of 1 ranks has 24; lr is not rescaled" in log
    # Fewer steps have been done by now, yet the later set is the newest.
    assert sets_of(folder / name) == [(stopped, 2), (4, 1)]
