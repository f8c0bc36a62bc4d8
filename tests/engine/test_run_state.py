"""A resumed run: what comes from the checkpoint and what from the config, where it continues, what it refuses."""

import json
import os
import pickle
import random
import signal

import cv2
import numpy as np
import pytest
import torch

from core.config import load_config
from engine.checkpoint import CheckpointError, complete_sets, load
from engine.schedule import learning_rate_factor
from tests.BCT_methods.whole_runs import sets_of
from tests.engine.test_trainer import Plain, WithBatchNorm, assert_same, config, rec, run  # noqa: F401


class Stopped(Plain):
    """Gets a SIGTERM during step `at`."""

    at = 4

    def losses(self, batch):
        if self.step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().losses(batch)


def stopped_after_five_steps(path, *overrides):
    torch.set_num_threads(1)
    trainer = Stopped(load_config(path, overrides))
    trainer.train()
    assert trainer.step == 5
    return trainer


@pytest.mark.parametrize("keys", [{}, {"gradient_acc": 2, "batch_size": 2}, {"optimizer": "adamw", "lr": 1e-3}])
def test_a_run_stopped_within_an_epoch_resumes_bit_for_bit(tmp_path, rec, keys):  # noqa: F811
    whole = run(config(tmp_path, rec, "whole", num_epoch=3, **keys))
    path = config(tmp_path, rec, "parts", num_epoch=3, **keys)
    stopped_after_five_steps(path)
    assert sets_of(tmp_path / "parts") == [(5, 1)]
    log = (tmp_path / "parts/training.log").read_text()
    assert "stopped by SIGTERM at step 5; resume with: python " in log and log.endswith(" --resume True\n")
    parts = run(path, "--resume", "True")
    assert_same(whole[0], parts[0], 0)
    assert torch.equal(whole[1], parts[1])
    final = [load(complete_sets(tmp_path / name)[-1] / "rank_0_of_1.pt") for name in ("whole", "parts")]
    assert_same(final[0]["optimizer"]["state"][0], final[1]["optimizer"]["state"][0], 0)


class Drawing(Plain):
    """Notes what each generator of a checkpoint gives at every step."""

    def setup(self):
        self.draws = {}

    def losses(self, batch):
        own = torch.rand((), generator=self.generator).item()
        self.draws[self.step] = random.random(), np.random.rand(), torch.rand(()).item(), own
        return super().losses(batch)


def test_every_random_generator_continues(tmp_path, rec):  # noqa: F811
    """The trainer seeds them all when it is made: of runs that draw nothing, both ways are alike."""
    runs = []
    for name, overrides in (("whole", []), ("parts", ["--num_epoch", "1"]), ("parts", ["--resume", "True"])):
        runs.append(Drawing(load_config(config(tmp_path, rec, name), overrides)))
        runs[-1].train()
    whole, before, resumed = (trainer.draws for trainer in runs)
    assert sorted(before) == list(range(6)) and sorted(resumed) == list(range(6, 12))
    assert {**before, **resumed} == whole


def test_checkpoints_within_epochs(tmp_path, rec):  # noqa: F811
    """6 steps of 4 an epoch, of 25 images: at 4, 6 (the epoch's end), 8, 12; the last two stay."""
    written = []

    class Watched(Plain):
        def save_checkpoint(self):
            written.append((self.epoch, self.step))
            super().save_checkpoint()

    Watched(load_config(config(tmp_path, rec, checkpoint_steps=4))).train()
    assert written == [(0, 4), (1, 6), (1, 8), (2, 12)]
    assert sets_of(tmp_path / "run") == [(8, 1), (12, 1)]
    assert [int(folder.name) for folder in complete_sets(tmp_path / "run")] == [25 + 2 * 4, 2 * 25]  # images seen
    written.clear()
    Watched(load_config(config(tmp_path, rec, "few", checkpoint_steps=4, save_all_states=False))).train()
    assert written == [(0, 4), (1, 8), (2, 12)]


def test_a_resumed_run_takes_lr_from_the_config(tmp_path, rec, capsys):  # noqa: F811
    path = config(tmp_path, rec, num_epoch=3)
    stopped_after_five_steps(path)
    trainer = Plain(load_config(path, ["--lr", "0.01", "--weight_decay", "0.0", "--num_epoch", "4"]))
    trainer.resume()
    group = trainer.optimizer.param_groups[0]
    assert group["lr"] == trainer.schedule.get_last_lr()[0] == 0.01 * learning_rate_factor(5, 6, 4)
    assert group["weight_decay"] == 0.0 and trainer.schedule.last_epoch == 5
    log = capsys.readouterr().out
    assert "changed since the checkpoint: lr was 0.05, now 0.01" in log
    assert "weight_decay was 0.0005, now 0.0" in log and "resume was" not in log and "margin_list was" not in log


def test_an_unfinished_run_is_not_overwritten(tmp_path, rec):  # noqa: F811
    path = config(tmp_path, rec, num_epoch=3)
    stopped_after_five_steps(path)
    with pytest.raises(CheckpointError, match=r"of an unfinished run \(step 5 of 18\).*--resume True"):
        run(path)
    assert sets_of(tmp_path / "run") == [(5, 1)]
    run(path, "--resume", "True")
    run(path)  # a finished run may be started again
    with pytest.raises(CheckpointError, match="has a run with method = 'Plain', this one has 'Stopped'"):
        stopped_after_five_steps(path)
    stopped_after_five_steps(path, "--overwrite")  # which deletes its checkpoints
    assert sets_of(tmp_path / "run") == [(5, 1)]
    stopped_after_five_steps(path, "--overwrite", "--lr", "0.1")


@pytest.mark.parametrize("keys", [{}, {"save_all_states": False}])
def test_a_finished_run_is_begun_again_only_with_the_same_values(tmp_path, rec, keys):  # noqa: F811
    path, output = config(tmp_path, rec, num_epoch=1, **keys), tmp_path / "run"
    run(path)
    model = (output / "model.pt").read_bytes()
    for words, said in [
        (["--lr", "0.01"], "lr = 0.05, this one has 0.01"),
        (["--margin_list", "(1.0, 0.4, 0.0)"], r"margin_list = .1.0, 0.5, 0.0., this one has .1.0, 0.4, 0.0."),
        (["--batch_size", "2", "--resume"] if keys else ["--batch_size", "2"], "batch_size = 4, this one has 2"),
    ]:
        with pytest.raises(CheckpointError, match=f"{output}: has a run with {said}; .* with --overwrite True"):
            run(path, *words)
    assert sets_of(output) == ([] if keys else [(6, 1)])
    assert (output / "model.pt").read_bytes() == model
    signed = json.loads((output / "run.json").read_text())
    assert {"method", "ranks", "seed", "digest of records"} < signed.keys() and "rec" not in signed
    run(path, "--num_workers", "1", "--frequent", "3", "--checkpoint_steps", "4")
    for content in (b"{", b"[]"):
        (output / "run.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{output}: has a run whose method and values are unknown"):
            run(path)
    run(path, "--overwrite")
    run(path)


def test_nothing_left_to_train_is_said(tmp_path, rec):  # noqa: F811
    path = config(tmp_path, rec, num_epoch=1)
    run(path)
    run(path, "--resume")
    said = "nothing to do: 1 epochs are done; to train longer, raise num_epoch = 1\n"
    assert said in (tmp_path / "run/training.log").read_text()


@pytest.mark.parametrize(
    "keys, words",
    [
        (["sampling"], []),
        (["config"], []),
        (["config", "batch_size"], ["--batch_size", "2"]),
        (["random", "torch"], []),
        (["optimizer", "param_groups"], []),
    ],
)
def test_a_checkpoint_that_lacks_something_is_named(tmp_path, rec, keys, words):  # noqa: F811
    stopped_after_five_steps(config(tmp_path, rec))
    (path,) = (tmp_path / "run").glob("checkpoints/*/rank_0_of_1.pt")
    inner = state = load(path)
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=f"{path}: has no '{keys[-1]}', so another version of this code wrote it"):
        run(config(tmp_path, rec), "--resume", *words)


def test_torchrun_restarts_resume_automatically(tmp_path, rec, monkeypatch):  # noqa: F811
    whole = run(config(tmp_path, rec, "whole", num_epoch=3))
    path = config(tmp_path, rec, "parts", num_epoch=3)
    stopped_after_five_steps(path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert_same(whole[0], run(path)[0], 0)


def test_a_changed_global_batch_on_the_same_ranks_is_refused(tmp_path, rec):  # noqa: F811
    stopped_after_five_steps(config(tmp_path, rec))
    with pytest.raises(CheckpointError, match="written with batch_size = 4 and gradient_acc = 1, this run has 2 and 1"):
        run(config(tmp_path, rec, batch_size=2, resume=True))
    run(config(tmp_path, rec, batch_size=2, gradient_acc=2, resume=True))  # the same steps


def test_a_run_with_another_order_of_images_is_refused(tmp_path, rec, monkeypatch):  # noqa: F811
    path = config(tmp_path, rec)
    stopped_after_five_steps(path)
    monkeypatch.setattr("engine.run_state.ORDER", "permutation")
    with pytest.raises(CheckpointError, match="draws the images in another order .feistel 8, now permutation.*output"):
        Plain(load_config(path)).resume()


def test_non_finite_weights_are_not_checkpointed(tmp_path, rec):  # noqa: F811
    class Broken(Plain):
        def update(self):
            super().update()
            if self.step == 8:
                with torch.no_grad():
                    self.backbone[0].weight[0, 0, 0, 0] = float("nan")

    with pytest.raises(CheckpointError, match="step 8: NaN or infinity in backbone.0.weight; nothing saved"):
        Broken(load_config(config(tmp_path, rec, checkpoint_steps=4))).train()
    assert sets_of(tmp_path / "run") == [(4, 1), (6, 1)]


class BreaksWithoutALoss(Plain):
    """The last gradient is non-finite, though the loss was finite."""

    def update(self):
        if self.step == self.total_steps - 1:
            self.backbone[0].weight.grad.fill_(float("nan"))
        super().update()


@pytest.mark.parametrize("keys", [{"save_all_states": False}, {"val_targets": ["pairs"], "verbose": 12}])
def test_non_finite_weights_are_not_saved_as_a_model(tmp_path, rec, keys):  # noqa: F811
    (tmp_path / "pairs.bin").write_bytes(pickle.dumps(([png(value) for value in range(4)], [True, False])))
    path = config(tmp_path, rec, clip_grad_norm=0.0, **keys)
    with pytest.raises(CheckpointError, match="step 12: NaN or infinity in backbone.0.weight; nothing saved"):
        BreaksWithoutALoss(load_config(path)).train()
    model = torch.load(tmp_path / "run/model.pt", weights_only=True)  # of the first epoch
    assert all(torch.isfinite(value).all() for value in model.values())
    assert not (tmp_path / "run/model_best.pt").exists()


def test_a_finished_run_is_recognised_for_any_checkpoint_steps(tmp_path, rec):  # noqa: F811
    path = config(tmp_path, rec, checkpoint_steps=5, save_all_states=False)
    run(path)
    assert sets_of(tmp_path / "run") == [(10, 1), (12, 1)]
    run(path)


def test_a_checkpoint_of_another_method_warns_or_is_refused(tmp_path, rec):  # noqa: F811
    path = config(tmp_path, rec, num_epoch=3)
    stopped_after_five_steps(path)
    run(path, "--resume", "True")
    assert "the checkpoint was written by Stopped, this run uses Plain" in (tmp_path / "run/training.log").read_text()
    stopped_after_five_steps(path, "--overwrite")
    with pytest.raises(CheckpointError, match=r"rank_0_of_1.pt: does not fit this run \(.*running_mean"):
        WithBatchNorm(load_config(path, ["--resume", "True"])).train()


def test_momentum_gets_its_parameters_memory_layout(tmp_path, rec):  # noqa: F811
    """As after a change of channels_last: fused optimisers refuse a momentum whose strides differ from the weight's."""
    path = config(tmp_path, rec, num_epoch=3)
    before = stopped_after_five_steps(path)
    trainer = Plain(load_config(path))
    weight = trainer.backbone[0].weight
    weight.data = weight.data.to(memory_format=torch.channels_last)
    trainer.resume()
    momentum = trainer.optimizer.state[weight]["momentum_buffer"]
    assert momentum.stride() == weight.stride() != before.backbone[0].weight.stride()
    assert torch.equal(momentum, before.optimizer.state[before.backbone[0].weight]["momentum_buffer"])


def png(value):
    return cv2.imencode(".png", np.full((112, 112, 3), value, np.uint8))[1].tobytes()


def test_the_best_model_survives_a_resume(tmp_path, rec, monkeypatch):  # noqa: F811
    """Verification says 0.5, 0.9, 0.7 | 0.8, 0.9, 0.95 after steps 2, 4, ...; the run is stopped after step 7."""
    (tmp_path / "pairs.bin").write_bytes(pickle.dumps(([png(value) for value in range(4)], [True, False])))
    said = iter([0.5, 0.9, 0.7, 0.8, 0.9, 0.95])
    monkeypatch.setattr(
        "engine.verification.Verifier.run", lambda self, backbone: {"self": {"a": next(said), "b": 0.5}}
    )
    kept = {}

    class Watched(Stopped):
        at = 6

        def save_backbone(self, name):
            super().save_backbone(name)
            kept[name, self.step] = {key: value.clone() for key, value in self.backbone.state_dict().items()}

    path = config(tmp_path, rec, val_targets=["pairs"], verbose=2)
    Watched(load_config(path)).train()
    best = torch.load(tmp_path / "run/model_best.pt", weights_only=True)
    assert_same(best, kept["model_best.pt", 4], 0)
    trainer = Plain(load_config(path, ["--resume", "True"]))
    trainer.train()
    assert trainer.best == {"accuracy": pytest.approx(0.725), "step": 12}
    log = (tmp_path / "run/training.log").read_text()
    for step, accuracy, its in ((6, 0.7, 4), (8, 0.7, 4), (10, 0.7, 4), (12, 0.725, 12)):
        assert f"[mean][{step}]Accuracy-Highest: {accuracy:.5f} at step {its}" in log
    assert_same(torch.load(tmp_path / "run/model_best.pt", weights_only=True), trainer.backbone.state_dict(), 0)
