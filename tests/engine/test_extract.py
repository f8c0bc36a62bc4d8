"""Feature files written by one and many ranks."""

import errno
import os
import types

import numpy as np
import pytest
import torch

from core import files
from core.distributed import rank
from core.errors import UserError
from dataset import SyntheticDataset
from engine import extract
from engine.extract import extract_features, shared_arrays
from old_model.feature_set import FeatureError
from tests.ranks import run_ranks

WIDTH = 6


class Pooled(torch.nn.Module):
    """Images -> [B, WIDTH]; BatchNorm and dropout make its two modes differ."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.pool = torch.nn.AvgPool2d(28)
        self.linear = torch.nn.Linear(48, WIDTH)
        self.norm = torch.nn.BatchNorm1d(WIDTH)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, images):
        return self.dropout(self.norm(self.linear(self.pool(images).flatten(1))))


def training_set(images=11):
    return SyntheticDataset(num_classes=4, num_image=images)


def as_input(dataset, row):
    return (dataset[row][0].permute(2, 0, 1)[None] / 255 - 0.5) / 0.5


def embed_one_by_one(model, dataset):
    model.eval()
    with torch.no_grad():
        rows = [model(as_input(dataset, row))[0].numpy() for row in range(len(dataset))]
    return np.stack(rows)


def test_rows_equal_embedding_one_by_one(tmp_path):
    model, dataset = Pooled().train(), training_set()
    model.dropout.eval()  # a part that its owner put into eval mode
    feature, label = tmp_path / "new" / "a_feature.npy", tmp_path / "new" / "a_label.npy"
    state = {key: value.clone() for key, value in model.state_dict().items()}
    extract_features(model, dataset, feature, label, embedding_size=WIDTH, batch_size=4, num_workers=0)
    assert model.training and model.norm.training and not model.dropout.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    rows, labels = np.load(feature), np.load(label)
    assert rows.dtype == np.float32 and labels.dtype == np.int64
    np.testing.assert_allclose(rows, embed_one_by_one(model, dataset), atol=1e-5)
    np.testing.assert_array_equal(labels, dataset.labels())
    assert sorted(path.name for path in feature.parent.iterdir()) == ["a_feature.npy", "a_label.npy"]


def _extract_on_a_rank(feature, label, images, wrap):
    model = Pooled()
    if wrap:
        model = torch.nn.parallel.DistributedDataParallel(model)
        model.forward = None  # the wrapper must not run: ranks have different numbers of batches
    extract_features(model, training_set(images), feature, label, embedding_size=WIDTH, batch_size=2, num_workers=0)
    return os.path.exists(feature) and os.path.exists(label)


@pytest.mark.parametrize("world_size, images, wrap", [(2, 11, False), (2, 5, True), (3, 2, False)])
def test_ranks_fill_one_file_together(tmp_path, world_size, images, wrap):
    feature, label = str(tmp_path / "a_feature.npy"), str(tmp_path / "a_label.npy")
    # On return, every rank can read the file.
    assert run_ranks(_extract_on_a_rank, world_size, feature, label, images, wrap) == [True] * world_size
    dataset = training_set(images)
    np.testing.assert_allclose(np.load(feature), embed_one_by_one(Pooled(), dataset), atol=1e-5)
    np.testing.assert_array_equal(np.load(label), dataset.labels())
    assert len(list(tmp_path.iterdir())) == 2


class Broken(Pooled):
    def forward(self, images):
        out = super().forward(images)
        return torch.where((images[:, :1, 0, 0] * 127.5).round() == self.where, torch.nan, out)


def test_a_failed_extraction_leaves_the_old_file(tmp_path):
    path, dataset = tmp_path / "a_feature.npy", training_set()
    path.write_bytes(b"before")
    model = Broken()
    model.where = round(float(as_input(dataset, 7)[0, 0, 0, 0]) * 127.5)
    with pytest.raises(FeatureError, match="row 7"):
        extract_features(model, dataset, path, tmp_path / "l.npy", embedding_size=WIDTH, batch_size=4, num_workers=0)
    with pytest.raises(FeatureError, match=f"embedding_size is {WIDTH + 1}"):
        extract_features(Pooled(), dataset, path, embedding_size=WIDTH + 1, num_workers=0)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_fails_before_the_work(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(extract, "reserve", full)
    path = tmp_path / "a_feature.npy"
    with pytest.raises(FeatureError, match="a_feature.npy.*No space left"):
        extract_features(Pooled(), training_set(), path, embedding_size=WIDTH, num_workers=0)
    assert not list(tmp_path.iterdir())


def _write_on_a_late_disk(folder, ever):
    """Rank 1 sees rank 0's folder, by another path, only after a while, or never."""
    late = folder / "late"
    files.time = types.SimpleNamespace(sleep=lambda _: ever and late.symlink_to(folder / "shared"))
    try:
        with shared_arrays(((late if rank() else folder / "shared") / "a.npy", (2, 1), np.float32)) as [array]:
            array.write(rank(), np.full((1, 1), 5 + rank()))
    except UserError as error:
        return f"{type(error).__name__}: {error}"


def test_ranks_wait_for_a_file_or_fail_together(tmp_path):
    assert run_ranks(_write_on_a_late_disk, 2, tmp_path, True) == [None, None]
    assert np.load(tmp_path / "shared" / "a.npy").tolist() == [[5], [6]]
    (tmp_path / "late").unlink()
    others, own = run_ranks(_write_on_a_late_disk, 2, tmp_path, False)
    assert own.startswith(f"FeatureError: {tmp_path}/late/a.npy: cannot be written (No such file or directory); ")
    assert others.startswith("DisagreementError: rank 1 on ") and others.endswith(own)
    assert os.listdir(tmp_path / "shared") == ["a.npy"]
