"""UniBCT's whole runs: when they refine and with what, resuming, ranks, values and files that do not fit."""

import os
import signal

import numpy as np
import pytest
import torch

from BCT_methods.UniBCT import refinement
from BCT_methods.UniBCT.train import UniBCT
from core.config import ConfigError, load_config
from core.state_file import CheckpointError
from engine.trainer import unwrap
from old_model.feature_set import FeatureError
from tests.BCT_methods.test_unibct import apart, class_means, slowly
from tests.BCT_methods.whole_runs import train, without_batch_norm, write_config, write_old_features
from tests.ranks import run_ranks

LABELS = [0, 1, 2, 3] * 6 + [4]  # class 4 has but one image


@pytest.fixture
def folder(tmp_path, make_record_set):
    make_record_set(tmp_path / "set.rec", LABELS)
    write_old_features(tmp_path, LABELS)
    return tmp_path


def config(folder, name, **keys):
    default = {"compat_start_epoch": 1, "refine_epochs": [1, 2], "num_epoch": 3, "decay_epoch": []}
    return write_config(folder, "UniBCT", name, **{**default, **keys})


class Watched(UniBCT):
    """Notes the new features of the training set as each epoch begins, the prototypes used in it, the loss terms."""

    def build_backbone(self):
        return without_batch_norm()

    def begin_epoch(self):
        self.notes = getattr(self, "notes", [])
        images = torch.stack([torch.as_tensor(self.train_set[row][0]) for row in range(25)])
        with torch.no_grad():
            new = unwrap(self.backbone)(images.permute(0, 3, 1, 2).float() / 127.5 - 1)
        super().begin_epoch()
        assert self.backbone.training
        self.notes.append((new.numpy(), self.extra["refinement"].prototypes.clone().numpy(), set()))

    def losses(self, batch):
        terms = super().losses(batch)
        self.notes[-1][2].update(terms)
        return terms


def test_a_run_refines_when_it_should_by_the_new_features_of_that_time(folder):
    run = Watched(load_config(config(folder, "run", num_epoch=4, refine_epochs=[1, 3], damping=0.8, temperature=0.1)))
    run.train()
    old, labels = np.load(folder / "old_feature.npy"), np.array(LABELS)
    assert [note[2] for note in run.notes] == [{"cls"}] + 3 * [{"cls", "old_cls"}]
    for epoch, refined_at in ((1, 1), (2, 1), (3, 3)):
        expected = slowly(old, run.notes[refined_at][0], labels, 0.8, 0.1)
        assert apart(run.notes[epoch][1], expected).max() < 1e-5
        assert apart(np.load(folder / f"run/prototypes_epoch_{refined_at}.npy"), expected).max() < 1e-5
    assert apart(run.notes[3][1], run.notes[1][1]).max() > 1e-3
    assert {path.name for path in (folder / "run").glob("*.npy")} == {f"prototypes_epoch_{e}.npy" for e in (1, 3)}


def test_before_the_first_refinement_the_plain_class_means_serve(folder):
    run = Watched(load_config(config(folder, "run", refine_epochs=[2])))
    run.train()
    means = class_means(np.load(folder / "old_feature.npy"), np.array(LABELS))
    assert apart(run.notes[1][1], means).max() < 1e-6
    assert apart(run.notes[2][1], means).max() > 1e-2
    assert [note[2] for note in run.notes] == [{"cls"}] + 2 * [{"cls", "old_cls"}]


@pytest.mark.parametrize("normalize", [False, True])
def test_a_refinement_before_the_term_begins_is_kept_for_it(folder, normalize):
    run = Watched(
        load_config(
            config(folder, "run", compat_start_epoch=2, refine_epochs=[1], normalize_prototypes=normalize, scale=2.0)
        )
    )
    run.train()
    expected = slowly(np.load(folder / "old_feature.npy"), run.notes[1][0], np.array(LABELS), normalize=normalize)
    assert apart(run.notes[2][1], expected).max() < 1e-5
    norms = 2 * np.linalg.norm(expected, axis=1)
    (told,) = (line for line in (folder / "run/training.log").open() if "effective scale" in line)
    assert told.endswith(f"median {np.median(norms):.2f} ({norms.min():.2f} to {norms.max():.2f})\n")


def test_a_resumed_run_has_the_prototypes_of_the_whole_one(folder):
    keys = {"refine_epochs": [1], "save_all_states": True}
    whole = train(UniBCT, config(folder, "whole", **keys))

    class Stopped(UniBCT):
        def build_backbone(self):
            return without_batch_norm()

        def begin_epoch(self):
            if self.epoch == 2:
                raise KeyboardInterrupt
            super().begin_epoch()

    path = config(folder, "parts", **keys)
    with pytest.raises(KeyboardInterrupt):
        Stopped(load_config(path)).train()
    backbone, centres, extra = train(UniBCT, path, "--resume", "True")
    assert extra["refinement.prototypes"].norm(dim=1).min() > 0.1
    assert all(torch.equal(backbone[name], value) for name, value in whole[0].items())
    assert torch.equal(centres, whole[1])
    assert torch.equal(extra["refinement.prototypes"], whole[2]["refinement.prototypes"])


class StoppedWithinAnEpoch(Watched):
    """After the first step of epoch 1, of two."""

    def train_epoch(self):
        if self.epoch == 1:
            self.stop.received = signal.SIGTERM
        return super().train_epoch()


def test_the_term_may_be_switched_on_within_an_epoch(folder):
    path = config(folder, "run", compat_start_epoch=2, refine_epochs=[], num_epoch=3)
    StoppedWithinAnEpoch(load_config(path)).train()
    run = Watched(load_config(path, ["--resume", "--compat_start_epoch", "1"]))
    run.resume()
    assert (run.epoch, run.step) == (1, 3)
    means = class_means(np.load(folder / "old_feature.npy"), np.array(LABELS))
    assert apart(run.extra["refinement"].prototypes, means).max() < 1e-6
    later = Watched(load_config(path, ["--resume"]))
    later.resume()
    assert not later.extra["refinement"].prototypes.any()


def test_a_resumed_run_does_not_mix_raw_and_normalised_prototypes(folder):
    path = config(folder, "run", num_epoch=2)
    train(UniBCT, path)
    with pytest.raises(CheckpointError, match="written with normalize_prototypes = False, this run has True; restore"):
        train(UniBCT, path, "--resume", "--normalize_prototypes", "True", "--num_epoch", "3")


@pytest.mark.parametrize(
    "name, before, remedy",
    [
        ("old_feature", "extract_features", "rewrite it"),
        ("old_label", "extract_features", "rewrite it"),
        ("new_feature_epoch_1", "refine_prototypes", "resume the run"),
    ],
)
def test_a_file_cut_during_a_refinement_is_named(folder, name, before, remedy, monkeypatch):
    """Through a memory map, the missing rows would be zeros or the end of the process (SIGBUS)."""
    run, function = UniBCT(load_config(config(folder, "run"))), getattr(refinement, before)

    def cut(*arguments, **keys):
        path = next(folder.rglob(f"{name}.npy"))
        array = np.load(path, mmap_mode="r")
        os.truncate(path, array.offset + array[:7].nbytes + 1)
        return function(*arguments, **keys)

    monkeypatch.setattr(refinement, before, cut)
    run.epoch = 1
    with pytest.raises(FeatureError, match=f"{name}.npy: truncated before the end of row 7; {remedy}"):
        run.begin_epoch()


def features_and_statistics(path):
    """The statistics of this rank's BatchNorm before and after a refinement, and the prototypes it gave."""
    torch.set_num_threads(1)
    run = UniBCT(load_config(path))
    norm = next(module for module in run.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d))
    norm.running_mean += run.rank
    run.epoch = 1
    run.begin_epoch()
    training = all(module.training for module in run.backbone.modules())
    return norm.running_mean.clone(), training, run.extra["refinement"].prototypes.clone()


def test_all_ranks_embed_with_the_backbone_of_rank_0(folder):
    _, _, expected = features_and_statistics(config(folder, "one"))
    results = run_ranks(features_and_statistics, 2, config(folder, "two"))
    assert all(training and not mean.any() for mean, training, _ in results)
    prototypes = torch.cat([share for _, _, share in results])
    assert apart(prototypes, expected).max() < 1e-5
    assert np.array_equal(np.load(folder / "two/prototypes_epoch_1.npy"), prototypes)


def epochs_of_class_means(path):
    run, taken = Watched(load_config(path)), []
    run.extra["refinement"].take_class_means = taken.append
    for run.epoch in (0, 1):
        run.begin_epoch()
        run.extra["refinement"].prototypes[:] = 1.0 - run.rank  # rank 1 has only classes without old features
    return taken


def test_class_means_are_taken_by_all_ranks_or_by_none(folder):
    path = config(folder, "run", compat_start_epoch=0, refine_epochs=[2])
    assert run_ranks(epochs_of_class_means, 2, path) == [[0], [0]]


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"refine_epochs": [1.5]}, "refine_epochs = .1.5.; it must be a list of whole numbers"),
        ({"refine_epochs": [0, 2]}, "refine_epochs = .0, 2.; it must be a list of whole numbers, each at least 1"),
        ({"compat_start_epoch": -1}, "compat_start_epoch = -1; it must be at least 0"),
    ],
)
def test_values_that_would_stop_a_run_only_epochs_later(folder, keys, message):
    with pytest.raises(ConfigError, match=message):
        UniBCT(load_config(config(folder, "run", **keys)))


def test_the_effective_scale_is_said_where_old_features_are_short(folder, capsys):
    features = np.load(folder / "old_feature.npy")
    np.save(folder / "old_feature.npy", 1.5 * features / np.linalg.norm(features, axis=1, keepdims=True))
    norm = np.median(np.linalg.norm(class_means(np.load(folder / "old_feature.npy"), np.array(LABELS)), axis=1))

    def told(name, **keys):
        UniBCT(load_config(config(folder, name, **keys)))
        return [line for line in capsys.readouterr().out.splitlines() if "effective scale" in line]

    for name, scale in (("raw", 1.0), ("scaled", 3.0)):
        (line,) = told(name, scale=scale)
        assert "have norm 1.50 (median)" in line and f"is {scale * norm:.2f};" in line
        assert line.endswith("set scale = 1.9")  # √8 / 1.5
    assert not told("unit", normalize_prototypes=True)
    np.save(folder / "old_feature.npy", features)
    assert not told("long")


def test_features_that_do_not_fit(folder, make_record_set):
    features = np.load(folder / "old_feature.npy")
    features[3, 2] = np.inf
    np.save(folder / "old_feature.npy", features)
    run = UniBCT(load_config(config(folder, "run")))
    with pytest.raises(FeatureError, match="old_feature.npy: row 3 of the old features is not finite"):
        run.extra["refinement"].take_class_means(0)
    make_record_set(folder / "set.rec", [0, 1, 3] * 8 + [4], num_classes=5)
    write_old_features(folder, [0, 1, 3] * 8 + [4])
    with pytest.raises(FeatureError, match=r"class 2 has no image \(1 of 5 classes"):
        UniBCT(load_config(config(folder, "run")))
