"""Images without an old feature, rows of zeros: an old-side term is the mean over the others, of all ranks."""

import numpy as np
import pytest
import torch

from BCT_methods.AdvBCT.boundary import class_boundaries
from BCT_methods.AdvBCT.discriminator import Discriminator, adversarial_loss
from BCT_methods.L2.loss import feature_l2_loss
from BCT_methods.LCE.loss import boundary_loss, center_alignment_loss
from BCT_methods.RACT.loss import ract_loss
from BCT_methods.UniBCT.prototypes import refine_prototypes
from core.distributed import mean_of_counted, rank
from losses import OldPrototypes, old_prototype_loss
from losses.sharded import cross_entropy_of_known
from tests.BCT_methods.test_every_method import start
from tests.BCT_methods.test_other_width import IMAGES, assert_two_ranks_are_one, log_softmax_at, train_on_ranks, unit
from tests.BCT_methods.whole_runs import METHODS, write_old_features
from tests.old_model.test_by_class import unit_class_means
from tests.ranks import run_ranks

CLASSES, WIDTH = 4, 8
THERE = torch.tensor([True, False, True, True, False, True, True, True, True, True, False, True])


@pytest.fixture
def batch():
    """`(new, old, labels)`: rows 1, 4 and 10 have no old feature, 1 and 5 and 9 are the class 1."""
    generator = torch.Generator().manual_seed(0)
    new, old = (torch.randn(12, WIDTH, dtype=torch.float64, generator=generator) for _ in range(2))
    return new.requires_grad_(), old * THERE[:, None], torch.arange(12) % CLASSES


def same(loss, expected, new, rows=THERE):
    """Both losses and their gradients; none goes to the rows that do not count."""
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    mine, theirs = (torch.autograd.grad(one, new, retain_graph=True)[0] for one in (loss, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert mine[rows].any(dim=1).all() and not mine[~rows].any()


def test_l2(batch):
    new, old, _ = batch
    same(feature_l2_loss(new, old), feature_l2_loss(new[THERE], old[THERE]), new)
    assert feature_l2_loss(new, 0 * old).item() == 0


def test_ract_leaves_them_out_of_old_negatives_but_not_of_new_ones(batch):
    new, old, labels = batch
    f, g, terms = unit(new), unit(old[THERE]), []
    for i in torch.arange(12)[THERE]:
        own = (unit(old)[i] * f[i]).sum()
        of_old = (g @ f[i])[labels[THERE] != labels[i]].topk(3).values
        of_new = (f.detach() @ f[i])[labels != labels[i]].topk(3).values
        terms.append(-log_softmax_at(torch.cat([own[None], of_old, of_new]) / 0.2, 0))
    loss, expected = ract_loss(new, old, labels, 0.2, 3), sum(terms) / len(terms)
    same(loss, expected, new)
    assert ract_loss(new, 0 * old, labels, 0.2, 3).item() == 0


@pytest.mark.parametrize("normalised", [True, False])
def test_the_adversary_sees_neither_side_of_them(batch, normalised):
    new, old, _ = batch
    model = Discriminator(WIDTH).double()
    loss = adversarial_loss(model, new, old, 1.0, normalised)
    same(loss, adversarial_loss(model, new[THERE], old[THERE], 1.0, normalised), new)
    assert torch.isfinite(adversarial_loss(model, new, 0 * old, 1.0, normalised))


def test_a_class_without_old_features_is_no_old_class(batch):
    new, _, labels = batch
    prototypes = torch.randn(CLASSES, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    prototypes[1] = 0
    others, place = labels != 1, torch.tensor([0, -1, 1, 2])
    sharded = OldPrototypes(CLASSES, WIDTH, stored=False)
    sharded.prototypes = prototypes
    expected = old_prototype_loss(new[others], place[labels[others]], prototypes[[0, 2, 3]], 3.0)
    for loss in (old_prototype_loss(new, labels, prototypes, 3.0), sharded(new, labels, 3.0)):
        same(loss, expected, new, others)
    kappa = torch.tensor([0.9, -1.0, 0.9, 0.9], dtype=torch.float64)
    expected = boundary_loss(new[others], place[labels[others]], prototypes[[0, 2, 3]], kappa[[0, 2, 3]])
    same(boundary_loss(new, labels, prototypes, kappa), expected, new, others)
    weight = torch.randn(CLASSES, WIDTH, dtype=torch.float64)
    expected = center_alignment_loss(weight[[0, 2, 3]], prototypes[[0, 2, 3]])
    torch.testing.assert_close(center_alignment_loss(weight, prototypes), expected)


def test_class_statistics_are_those_of_the_others(batch):
    new, old, labels = batch
    old[labels == 1] = 0
    there = old.any(dim=1)
    rows, classes = old.numpy(), labels.numpy()
    few, of_few = rows[there], classes[there]
    np.testing.assert_allclose(unit_class_means(rows, classes, CLASSES), unit_class_means(few, of_few, CLASSES))
    for mine, theirs in zip(class_boundaries(rows, classes, CLASSES), class_boundaries(few, of_few, CLASSES)):
        np.testing.assert_array_equal(mine, theirs)
    found = refine_prototypes(old, new.detach(), labels, 0.9, 0.2)
    kept = torch.tensor([0, -1, 1, 2])[labels[there]]
    expected = refine_prototypes(old[there], new.detach()[there], kept, 0.9, 0.2)
    torch.testing.assert_close(found[[0, 2, 3]], expected)
    assert not found[1].any()


# --- whole runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """As test_other_width's: a third of the images, and all of rank 1's classes, 3 and 4, have no old feature."""
    folder, labels = tmp_path_factory.mktemp("missing"), np.arange(IMAGES) % 5
    write_old_features(folder, labels)
    rows = np.load(folder / "old_feature.npy")
    rows[(np.arange(IMAGES) % 3 == 1) | (labels >= 3)] = 0
    np.save(folder / "old_feature.npy", rows)
    means = np.array([rows[(labels == label) & rows.any(axis=1)].sum(axis=0) for label in range(5)])
    np.save(folder / "old_avg_feature.npy", means.astype(np.float32))
    return train_on_ranks(folder, labels)


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_are_one(runs, method):
    assert_two_ranks_are_one(runs, method)


def mean_of_two_ranks():
    """Rank 0 has three rows that count, rank 1 none."""
    total = torch.tensor(6.0 if rank() == 0 else 0.0, requires_grad=True)
    mean = mean_of_counted(2 * total, torch.tensor(3 if rank() == 0 else 0))
    mean.backward()
    return mean.detach(), total.grad


def test_a_rank_without_any_counts_nothing():
    for mean, grad in run_ranks(mean_of_two_ranks, 2):
        assert (mean.item(), grad.item()) in ((4.0, pytest.approx(2 / 3)), (4.0, 0.0))


def test_labels_that_no_rank_has():
    logits = torch.randn(3, 4, requires_grad=True)
    loss = cross_entropy_of_known(logits, torch.tensor([2, -1, 0]))
    expected = torch.nn.functional.cross_entropy(logits[[0, 2]], torch.tensor([2, 0]))
    torch.testing.assert_close(loss, expected)
    assert cross_entropy_of_known(logits, torch.full((3,), -1)).item() == 0


@pytest.mark.parametrize("method", METHODS)
def test_batches_mark_rows_of_zeros_and_the_log_says_so_once(method, tmp_path, capsys):
    write_old_features(tmp_path, np.arange(12) % 3)
    rows = np.load(tmp_path / "old_feature.npy")
    rows[::2] = 0
    np.save(tmp_path / "old_feature.npy", rows)
    np.save(tmp_path / "credible.npy", np.ones(12, bool))
    run = start(method, tmp_path)
    if run.old_features != "rows":
        return
    run.loader.set_epoch(0)
    for batch in run.loader:
        assert np.array_equal(batch.credible, batch.index % 2 == 1)
        sum(run.losses(batch).values()).backward()
    assert capsys.readouterr().out.count("images without an old feature, which have no old-side term") == 1
