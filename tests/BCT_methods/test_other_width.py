"""A new model twice as wide as the old one, and half as wide: each method's terms by hand, and whole runs on ranks."""

import numpy as np
import pytest
import torch

from BCT_methods.AdvBCT.boundary import ElasticBoundary, point_to_set_loss
from BCT_methods.AdvBCT.discriminator import Discriminator, adversarial_loss
from BCT_methods.L2.loss import feature_l2_loss
from BCT_methods.LCE.loss import boundary_loss, center_alignment_loss
from BCT_methods.MixBCT.mix import mix_old_features
from BCT_methods.NCCL.loss import NeighborhoodConsensusLoss
from BCT_methods.NCCL.train import NCCL
from BCT_methods.RACT.loss import ract_loss
from BCT_methods.UniBCT.prototypes import refine_prototypes
from losses import ArcFace, OldPrototypes, PartialFC, old_prototype_loss
from tests.BCT_methods.test_every_method import start
from tests.BCT_methods.test_ranks_agree import CASES, SEED, TOLERANCE, steps, trained
from tests.BCT_methods.whole_runs import METHODS, WIDTH, write_config, write_old_features
from tests.conftest import draw_record_set
from tests.losses.test_old_width import by_hand
from tests.ranks import run_ranks

D, CLASSES = 8, 5  # the old features' width in the formulas
widths = pytest.mark.parametrize("width", [4, 16], ids=["narrower", "wider"])


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batch(width, rows=12):
    """`(new [rows, width], q, old [rows, D], labels)`: q is what is compared with old ones, made by hand."""
    new, old = 3 * random(rows, width), 7 * random(rows, D, seed=1)
    return new, torch.from_numpy(by_hand(new, D)), old, torch.arange(rows) % CLASSES


def unit(rows):
    return rows / rows.norm(dim=-1, keepdim=True)


def log_softmax_at(scores, place):
    return scores[place] - torch.log(torch.exp(scores).sum())


@widths
def test_l2_and_prototypes(width):
    new, q, old, labels = batch(width)
    expected = sum(max((q[i] - unit(old[i])).norm().item() - 0.2, 0) for i in range(len(q))) / len(q)
    assert feature_l2_loss(new, old, 0.2).item() == pytest.approx(expected, abs=1e-9)

    prototypes = random(CLASSES, D, seed=2)
    expected = -sum(log_softmax_at(3 * prototypes @ q[i], labels[i]) for i in range(len(q))) / len(q)
    sharded = OldPrototypes(CLASSES, D, stored=False)
    sharded.prototypes = prototypes
    for loss in (old_prototype_loss(new, labels, prototypes, 3.0), sharded(new, labels, 3.0)):
        assert loss.item() == pytest.approx(expected.item(), abs=1e-9)


@widths
def test_lce(width):
    new, q, _, labels = batch(width)
    weight, centers, kappa = random(CLASSES, width, seed=3), random(CLASSES, D, seed=4), torch.full((CLASSES,), 0.9)
    w = torch.from_numpy(by_hand(weight, D))
    expected = ((w - unit(centers)) ** 2).sum().item() / (CLASSES * D)
    assert center_alignment_loss(weight, centers).item() == pytest.approx(expected, abs=1e-9)
    cosines = (q * unit(centers)[labels]).sum(1)
    expected = (kappa[labels] - cosines).clamp(min=0).mean().item()
    assert boundary_loss(new, labels, centers, kappa).item() == pytest.approx(expected, abs=1e-6)


@widths
def test_ract_compares_new_negatives_whole(width):
    new, q, old, labels = batch(width)
    f, g, total = unit(new), unit(old), 0.0
    for i in range(len(new)):
        others = [k for k in range(len(new)) if labels[k] != labels[i]]
        of_old = sorted((q[i] @ g[k] for k in others), reverse=True)[:3]
        of_new = sorted((f[i] @ f[k] for k in others), reverse=True)[:3]
        total -= log_softmax_at(torch.stack([q[i] @ g[i], *of_old, *of_new]) / 0.2, 0)
    assert ract_loss(new, old, labels, 0.2, 3).item() == pytest.approx(total.item() / len(new), abs=1e-9)


@widths
def test_advbct(width):
    new, q, old, labels = batch(width)
    centers, radius = random(CLASSES, D, seed=3) / 4, torch.full((CLASSES,), 0.3).double()
    count = torch.full((CLASSES,), 9)
    boundary = ElasticBoundary(CLASSES).double()
    reach = radius + torch.sigmoid(boundary.elastic) * (0.4 - radius)
    excess = [((q[i] - centers[labels[i]]).norm() - reach[labels[i]]).item() for i in range(len(q))]
    outside = [value for value in excess if value > 0]
    loss = point_to_set_loss(new, labels, centers, radius, count, boundary, 0.4)
    assert len(outside) > 3 and loss.item() == pytest.approx(sum(outside) / len(outside), abs=1e-9)

    discriminator = Discriminator(D).double()
    padded = torch.zeros(len(new), D, dtype=torch.float64)
    padded[:, : min(width, D)] = new[:, : min(width, D)]
    for normalised, mine, others in ((True, q, unit(old)), (False, padded, old)):
        every = torch.ones(len(new), dtype=torch.bool)
        expected = -discriminator(mine, every)[:, 0].mean() - discriminator(others, every)[:, 1].mean()
        loss = adversarial_loss(discriminator, new, old, 1.0, normalised)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-9)


@widths
def test_nccl_with_the_logits_of_padded_features_or_padded_centres(width):
    new, q, old, labels = batch(width)
    classifier = PartialFC(ArcFace(), width, CLASSES).double()
    run = type("Run", (), {"classifier": classifier})
    old_logits, new_logits = NCCL.logits(run, old, new)
    wide = max(width, D)
    pad = lambda rows: torch.cat([rows, torch.zeros(len(rows), wide - rows.shape[1], dtype=torch.float64)], 1)  # noqa: E731
    z, centres = unit(pad(old)) @ unit(pad(classifier.weight)).T, unit(new) @ unit(classifier.weight).T
    torch.testing.assert_close(old_logits, z.detach())
    torch.testing.assert_close(new_logits, centres)

    loss = NeighborhoodConsensusLoss(D, CLASSES, 64, 0.5).double()
    embedding, logit = loss(old, old_logits, new, new_logits, labels)
    g, expected = unit(old), [0.0, 0.0]
    for i in range(len(new)):
        positives = [j for j in range(len(new)) if labels[j] == labels[i]]
        for j in positives:
            weight = (g[i] @ g[j] + 1) / 2 / len(positives)
            expected[0] -= weight * log_softmax_at(g @ q[i] / 0.5, j)
            expected[1] -= weight * log_softmax_at(z @ centres[i] / 0.5, j)
    assert embedding.item() == pytest.approx(expected[0].item() / len(new), abs=1e-9)
    assert logit.item() == pytest.approx(expected[1].item() / len(new), abs=1e-9)


@widths
def test_mixed_batches_have_the_wider_ones_columns(width):
    new, _, old, _ = batch(width)
    credible = torch.arange(12) < 4
    mixed = mix_old_features(new, old, credible, 1.0)
    assert mixed.shape == (12, max(width, D))
    torch.testing.assert_close(mixed[:4, :D], unit(old.float())[:4].double())
    torch.testing.assert_close(mixed[4:, :width], new[4:])
    assert not mixed[:4, D:].any() and not mixed[4:, width:].any()


@widths
def test_unibct_takes_the_structure_of_the_whole_new_features(width):
    new, _, old, labels = batch(width)
    found = refine_prototypes(old, new, labels, 0.9, 0.2)
    for label in range(CLASSES):
        f, values = unit(new[labels == label]), old[labels == label]
        n = len(f)
        similarity = (f @ f.T / 0.2).fill_diagonal_(-np.inf)
        walks = 0.1 * torch.linalg.inv(torch.eye(n, dtype=torch.float64) - 0.9 * similarity.softmax(1))
        torch.testing.assert_close(found[label], (walks @ values).mean(0))


# --- whole runs: the new model keeps its width, the old features' changes -----------------------------------------

IMAGES, BATCH = 26, 12  # two steps an epoch
OLD_WIDTHS = {"wider": WIDTH // 2, "narrower": 2 * WIDTH}


def trained_all(paths):
    torch.set_num_threads(1)
    return {name: trained(CASES[name], path) for name, path in paths.items()}


def train_on_ranks(folder, labels):
    """`{ranks: [{method: what a rank has trained}]}` on a record set with these labels and the old features there."""
    draw_record_set(folder / "set.rec", labels.tolist())
    np.save(folder / "credible.npy", np.arange(len(labels)) % 3 > 0)
    paths = {}
    for ranks in (1, 2):
        for name in METHODS:
            keys = {k: str(folder / v) if k == "credible_old_feature" else v for k, v in CASES[name].keys.items()}
            common = {"seed": SEED, "lr": 0.02, "num_epoch": 2, "clip_grad_norm": 0.0, "save_all_states": False}
            common |= {"batch_size": BATCH // ranks, "decay_epoch": [2]}
            paths[ranks, name] = write_config(folder, name, f"{name}_{ranks}", **common, **keys)
    return {ranks: run_ranks(trained_all, ranks, {name: paths[ranks, name] for name in METHODS}) for ranks in (1, 2)}


def assert_two_ranks_are_one(results, method):
    (one,), two = ([result[method] for result in results[ranks]] for ranks in (1, 2))
    expected = steps(one)
    assert len(expected) == 4
    for name in expected[-1]:
        assert len({step[name].item() for step in expected if name in step}) > 1, f"{name} never changes"
    for result in two:
        torch.testing.assert_close(steps(result), expected, **TOLERANCE)
        torch.testing.assert_close(result["replicated"], one["replicated"], rtol=1e-5, atol=2e-5)
    for name, whole in one["sharded"].items():
        torch.testing.assert_close(torch.cat([result["sharded"][name] for result in two]), whole, rtol=1e-5, atol=2e-5)


@pytest.fixture(scope="module", params=OLD_WIDTHS)
def runs(request, tmp_path_factory):
    """`(which, results of train_on_ranks)` of a new model that is wider or narrower than the old one."""
    folder, labels = tmp_path_factory.mktemp(request.param), np.arange(IMAGES) % CLASSES
    write_old_features(folder, labels, width=OLD_WIDTHS[request.param])
    return request.param, train_on_ranks(folder, labels)


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_are_one(runs, method):
    assert_two_ranks_are_one(runs[1], method)


def test_columns_of_the_classifier(runs):
    which, results = runs
    for method in METHODS:
        columns = results[1][0][method]["sharded"]["weight"].shape[1]
        assert columns == (max(WIDTH, OLD_WIDTHS[which]) if method == "MixBCT" else WIDTH), method


@pytest.mark.parametrize("method", METHODS)
def test_the_log_says_which_part_is_compared(method, tmp_path, capsys):
    for old_width, said in ((4, "by the first 4 coordinates"), (16, "padded with zeros")):
        write_old_features(tmp_path, np.arange(12) % 3, width=old_width)
        np.save(tmp_path / "credible.npy", np.ones(12, bool))
        start(method, tmp_path)
        assert (
            f"old features of width {old_width}: new ones, of 8, are compared with them {said}"
            in capsys.readouterr().out
        )
