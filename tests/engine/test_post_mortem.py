"""The report on a non-finite loss: its message, and its file, from which the batch can be reproduced."""

import os
import re
import textwrap

import numpy as np
import pytest
import torch

from core.config import load_config
from core.state_file import load
from dataset import RecordDataset
from engine import post_mortem
from engine.monitor import NonFiniteLoss
from engine.order import ShuffledRows
from engine.trainer import Trainer
from tests.engine.test_trainer import Plain, config, rec  # noqa: F401
from tests.ranks import run_ranks

BAD = 8  # steps done before the bad batch: the third of the epoch 1, whose first is 6


class Broken(Plain):
    """A term is NaN from step BAD on, in the last batch of the step."""

    def losses(self, batch):
        self.batches = getattr(self, "batches", 0) + 1
        terms = super().losses(batch)
        bad = self.batches == (BAD + 1) * self.cfg.gradient_acc
        return {**terms, "other": terms["cls"].detach() * (float("nan") if bad else 0.5)}


class BrokenWeights(Plain):
    """An update leaves NaN in the weights."""

    def update(self):
        super().update()
        if self.step == BAD:
            with torch.no_grad():
                self.backbone[3].bias[2] = float("nan")


class Tiny(Trainer):
    """A backbone of the registry, with BatchNorm."""

    def losses(self, batch):
        cls = self.classifier(self.backbone(batch.images), batch.labels)
        return {"cls": cls, "other": cls * float("nan" if self.step == BAD else "1")}


def message(kind, path, *overrides):
    """Run until the loss is non-finite; the error's message and the trainer."""
    torch.set_num_threads(1)
    trainer = kind(load_config(path, overrides))
    with pytest.raises(NonFiniteLoss) as caught:
        trainer.train()
    return str(caught.value), trainer


def found_in(trainer):
    return load(f"{trainer.cfg.output}/nonfinite_step_{BAD}_rank_{trainer.rank}.pt")


def test_the_message_names_step_terms_keys_and_file(tmp_path, rec):  # noqa: F811
    text, trainer = message(Broken, config(tmp_path, rec))
    form = (
        rf"step {BAD}: .*cls \d+\.\d+, other nan \(before it \d\S+, \d\S+, \d\S+\).* keys (\d+, \d+, \d+, \d+) of "
        rf"{re.escape(str(rec))}; .*{re.escape(str(tmp_path))}/run/nonfinite_step_{BAD}_rank_0\.pt\. "
        "The weights are finite.* lower lr .*resume True"
    )
    match = re.fullmatch(form, text)
    assert match, text
    found = found_in(trainer)
    assert [int(key) for key in match[1].split(", ")] == found["keys"].tolist()


@pytest.mark.parametrize("gradient_acc", [1, 2])
def test_the_file_has_the_batch_and_the_state(tmp_path, rec, gradient_acc):  # noqa: F811
    """Against the batch from the loader's plan and the record file."""
    path = config(tmp_path, rec, batch_size=4 // gradient_acc, gradient_acc=gradient_acc)
    _, trainer = message(Broken, path)
    found, train_set = found_in(trainer), RecordDataset(rec)
    plan = ShuffledRows(25, 4 // gradient_acc, trainer.cfg.seed, 0, 1)
    plan.epoch = 1
    rows, mirrored = list(plan)[3 * gradient_acc - 1]
    assert (found["step"], found["epoch"]) == (BAD, 1)
    assert np.array_equal(found["rows"], rows) and np.array_equal(found["mirrored"], mirrored)
    assert found["keys"].tolist() == [int(train_set.keys[row]) for row in rows]
    assert found["labels"].tolist() == [train_set.label(row) for row in rows]
    steps = [batch // gradient_acc for batch in range((BAD + 1) * gradient_acc - 1)]
    assert [step for step, _ in found["before"]] == steps and found["broken"] == []
    assert all(terms["other"] == pytest.approx(terms["cls"] / 2) for _, terms in found["before"])
    for name, value in trainer.backbone.state_dict().items():
        assert torch.equal(found["state"]["backbone"][name], value)
    assert found["state"]["step"] == BAD and found["state"]["config"]["lr"] == trainer.cfg.lr


def test_only_the_batchs_keys_are_read(tmp_path, rec):  # noqa: F811
    """All of them, of millions in a file, would take minutes."""
    _, trainer = message(Broken, config(tmp_path, rec))
    read = set()

    class Keys:
        def __len__(self):
            return 25

        def __getitem__(self, row):
            read.add(row)
            return range(1, 26)[row]

    trainer.train_set.keys = Keys()
    post_mortem.explain(trainer, NonFiniteLoss(BAD, {"cls": float("nan")}, torch.arange(4)))
    assert read == {0, 1, 2, 3} and found_in(trainer)["keys"].tolist() == [1, 2, 3, 4]


def test_weights_broken_by_an_earlier_step_are_named(tmp_path, rec):  # noqa: F811
    text, trainer = message(BrokenWeights, config(tmp_path, rec, clip_grad_norm=0.0))
    assert "An earlier step broke backbone.3.bias: lower lr or raise warmup_epoch, or set clip_grad_norm" in text
    assert found_in(trainer)["broken"] == ["backbone.3.bias"]


def test_the_docstrings_code_reproduces_the_loss(tmp_path, rec):  # noqa: F811
    _, trainer = message(Tiny, config(tmp_path, rec))
    code = textwrap.dedent(post_mortem.__doc__.split("backbone on the batch:\n")[1].split("\nTo reproduce")[0])
    code = code.replace("work_dirs/<run>", trainer.cfg.output).replace("<step>", str(BAD))
    names = {}
    exec("import torch, backbones, dataset, core.state_file\n" + code, names)
    found = names["found"]
    assert trainer.classifier(names["embeddings"], found["labels"]).item() == pytest.approx(found["terms"]["cls"], 1e-5)


def test_a_full_disk_does_not_hide_the_error(tmp_path, rec, monkeypatch):  # noqa: F811
    def full(state, file, save=torch.save):
        if "terms" in state:
            raise OSError(28, os.strerror(28))
        save(state, file)

    monkeypatch.setattr("engine.checkpoint.torch.save", full)
    text, _ = message(Broken, config(tmp_path, rec))
    assert text.startswith(f"step {BAD}: the loss is not finite: cls ") and "This rank's batch: keys " in text
    assert f"nonfinite_step_{BAD}_rank_0.pt cannot be written: CheckpointError: " in text
    assert "No space left on device" in text and not list(tmp_path.glob("run/.*nonfinite*"))


def test_synthetic_images_are_named_by_row(tmp_path):
    keys = {"num_classes": 5, "num_image": 64, "batch_size": 10}
    text, trainer = message(Broken, config(tmp_path, "synthetic", **keys))
    found = found_in(trainer)
    assert found["keys"] is None
    assert f"rows {', '.join(map(str, found['rows'][:8].tolist()))} and 2 more of synthetic; " in text


class ReadLate(Plain):
    """The loss is read one batch later, as on CUDA."""

    def accumulate(self, batch, last):
        cls = super().losses(batch)["cls"] * float("nan" if self.step == BAD else "1")
        late, self.late = getattr(self, "late", None), (self.step, ["cls"], cls.detach()[None], batch.index, None)
        self.monitor._take(late)
        cls.backward()


def test_a_late_read_does_not_blame_the_updated_weights(tmp_path, rec):  # noqa: F811
    text, trainer = message(ReadLate, config(tmp_path, rec))
    assert text.endswith(". Lower lr or raise warmup_epoch, then resume with --resume True")
    found = found_in(trainer)
    assert found["step"] == BAD and found["state"]["step"] == BAD + 1
    assert set(found["broken"]) >= {"backbone.3.weight", "classifier.weight"}


def test_finite_weights_under_a_loss_scaler_point_to_float16(tmp_path, rec, monkeypatch):  # noqa: F811
    _, trainer = message(Broken, config(tmp_path, rec))
    monkeypatch.setattr(trainer.scaler, "is_enabled", lambda: True)
    for update_done in (0, 1):
        error = NonFiniteLoss(trainer.step - update_done, {"cls": float("inf")}, torch.arange(4))
        post_mortem.explain(trainer, error)
        assert 'float16 overflows at 65504: set amp_dtype = "bfloat16" or fp16 = False, then resume' in str(error)


def stop_on_all(path):
    text, trainer = message(Broken, path)
    return text, found_in(trainer)["rows"], trainer.step


def test_every_rank_stops_at_the_step_and_writes_its_file(tmp_path, rec):  # noqa: F811
    results = run_ranks(stop_on_all, 2, config(tmp_path, rec, batch_size=2))
    plan = [ShuffledRows(25, 2, 666, rank, 2) for rank in (0, 1)]
    for rank, (text, rows, step) in enumerate(results):
        plan[rank].epoch = 1
        assert step == BAD and f"nonfinite_step_{BAD}_rank_{rank}.pt" in text
        assert np.array_equal(rows, list(plan[rank])[2][0])


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [{"fp16": False}, {"amp_dtype": "bfloat16"}, {"amp_dtype": "float16"}])
def test_on_cuda_the_bad_step_is_named(tmp_path, rec, keys):  # noqa: F811
    text, trainer = message(Tiny, config(tmp_path, rec, **keys))
    found = found_in(trainer)
    assert found["step"] == BAD and found["state"]["step"] == BAD + 1
    assert bool([name for name in found["broken"] if name.endswith("weight")]) == (keys != {"amp_dtype": "float16"})
    assert ("float16 overflows at 65504" in text) == (keys == {"amp_dtype": "float16"})
