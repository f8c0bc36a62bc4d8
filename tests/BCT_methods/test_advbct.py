"""AdvBCT: elastic radius, adversary against slow loops; several ranks against one; whole runs."""

import math

import numpy as np
import pytest
import torch

from BCT_methods.AdvBCT.boundary import ElasticBoundary, class_boundaries, point_to_set_loss
from BCT_methods.AdvBCT.discriminator import Discriminator, adversarial_loss, reversal_strength, reverse_gradient
from BCT_methods.AdvBCT.train import AdvBCT
from core import distributed
from core.config import load_config
from engine.checkpoint import complete_sets
from old_model import by_class
from tests.BCT_methods.whole_runs import launch, write_config
from tests.ranks import run_ranks

WIDTH, CLASSES = 6, 5


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(by_class, "CHUNK", 7)


# --- point to set -----------------------------------------------------------------------------------------------


def sets(rows, seed=0):
    """(embeddings, labels, centers, radius, count): class 3 has one distance, class 4 none."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64)
    centers *= 0.8 / centers.norm(dim=1, keepdim=True)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    embeddings = centers[labels] + 0.25 * torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    radius = torch.tensor([0.5, 0.3, 0.7, 0.2, 0.0], dtype=torch.float64)
    return (embeddings * 7).requires_grad_(), labels, centers, radius, torch.tensor([4, 9, 2, 1, 0])


def point_to_set_slowly(embeddings, labels, centers, radius, count, elastic, threshold):
    excesses = []
    for f, y in zip(embeddings, labels.tolist()):
        r = radius[y] + 1 / (1 + (-elastic[y]).exp()) * (threshold - radius[y])
        excess = ((f / f.norm() - centers[y]) ** 2).sum().sqrt() - r
        if count[y] > 1 and excess > 0:
            excesses.append(excess)
    return sum(excesses) / len(excesses) if excesses else embeddings.sum() * 0, len(excesses)


def test_point_to_set_against_a_loop():
    args, boundary = sets(40), ElasticBoundary(CLASSES).double()
    loss = point_to_set_loss(*args, boundary, 0.4)
    expected, outside = point_to_set_slowly(*args, boundary.elastic, 0.4)
    assert 5 < outside < 35
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    leaves = (args[0], boundary.elastic)
    grads = torch.autograd.grad(loss, leaves)
    for grad, reference in zip(grads, torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(grad, reference, rtol=1e-10, atol=1e-14)
    assert not grads[1][3:].any() and grads[1][:3].all()


def test_radius_lies_between_the_largest_distance_and_the_threshold():
    boundary, radius = ElasticBoundary(3), torch.tensor([0.2, 0.4, 0.9])
    assert boundary.elastic.shape == (3,) and boundary.elastic.abs().max() <= 1
    every = torch.arange(3)
    with torch.no_grad():
        for e, expected in ((-30.0, radius), (30.0, torch.full((3,), 0.4)), (0.0, (radius + 0.4) / 2)):
            boundary.elastic.fill_(e)
            torch.testing.assert_close(boundary(every, radius, 0.4), expected)


def test_nobody_outside_costs_nothing():
    embeddings, labels, centers, radius, count = sets(12)
    boundary = ElasticBoundary(CLASSES).double()
    for far, few in ((3.0, count), (0.0, torch.ones_like(count))):
        loss = point_to_set_loss(embeddings, labels, centers, torch.full_like(radius, far), few, boundary, far)
        assert loss.item() == 0
        assert not any(grad.any() for grad in torch.autograd.grad(loss, (embeddings, boundary.elastic)))


def test_elastic_scalars_start_anywhere_between_minus_one_and_one():
    elastic = ElasticBoundary(4000).elastic
    assert -1 <= elastic.min() < -0.98 and 0.98 < elastic.max() <= 1 and elastic.mean().abs() < 0.05


# --- adversary --------------------------------------------------------------------------------------------------


def adversary_slowly(model, new, old, normalize=True):
    """The NLL of each batch by the layers' definitions, with that batch's own BatchNorm statistics."""
    total = 0
    for features, label in ((new, 0), (old, 1)):
        rows = features / features.norm(dim=1, keepdim=True) if normalize else features
        hidden = rows @ model.hidden.weight.T + model.hidden.bias
        mean, variance = hidden.mean(0), ((hidden - hidden.mean(0)) ** 2).mean(0)
        hidden = (hidden - mean) / (variance + 1e-5).sqrt() * model.norm.weight + model.norm.bias
        scores = hidden.clamp(min=0) @ model.out.weight.T + model.out.bias
        total = total - sum((row[label].exp() / row.exp().sum()).log() for row in scores) / len(scores)
    return total


def test_adversary_against_a_loop_and_the_gradient_turned_round():
    torch.manual_seed(0)
    model = Discriminator(WIDTH).double()
    assert (model.hidden.out_features, model.out.out_features) == (100, 2)
    new, old = (torch.randn(9, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected = adversary_slowly(model, new, old)
    reference = torch.autograd.grad(expected, (new, *model.parameters()), retain_graph=True)
    for alpha in (0.0, 0.7):
        loss = adversarial_loss(model, new, old, alpha)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        grad, *own = torch.autograd.grad(loss, (new, *model.parameters()), retain_graph=True)
        torch.testing.assert_close(grad, -alpha * reference[0], rtol=1e-9, atol=1e-12)
        for mine, theirs in zip(own, reference[1:]):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert torch.autograd.grad(loss, old, allow_unused=True) == (None,)


def test_features_as_the_networks_give_them():
    """Lengths of the rows count without normalisation: by the same loop, on rows that are not divided by their norm."""
    torch.manual_seed(0)
    model = Discriminator(WIDTH).double()
    new, old = (torch.randn(9, WIDTH, dtype=torch.float64) * torch.rand(9, 1) * 20 for _ in range(2))
    new.requires_grad_()
    loss = adversarial_loss(model, new, old, 0.7, normalize_input=False)
    expected = adversary_slowly(model, new, old, normalize=False)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    leaves = (new, *model.parameters())
    first, second = (torch.autograd.grad(one, leaves) for one in (loss, expected))
    torch.testing.assert_close(first[0], -0.7 * second[0], rtol=1e-9, atol=1e-12)
    for mine, theirs in zip(first[1:], second[1:]):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert not torch.isclose(adversarial_loss(model, new, old, 0.7), loss, rtol=1e-3)


def test_reversed_gradient_and_its_strength():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    out = reverse_gradient(x, 0.25)
    assert torch.equal(out, x)
    out.pow(2).sum().backward()
    assert x.grad.tolist() == [-0.5, 1.0]
    assert reversal_strength(0) == 0
    assert reversal_strength(0.1) == pytest.approx(2 / (1 + math.e**-1) - 1)
    assert reversal_strength(1) == pytest.approx(1, abs=1e-4)


def test_log_probabilities_in_evaluation_too():
    model = Discriminator(WIDTH).eval()
    torch.testing.assert_close(
        model(torch.randn(3, WIDTH), torch.ones(3, dtype=torch.bool)).exp().sum(1), torch.ones(3)
    )


# --- ranks ------------------------------------------------------------------------------------------------------


def losses_on_rank():
    """Both losses of this rank's rows of 12, their gradients to its embeddings, and those to the shared parameters."""
    torch.manual_seed(4)
    boundary, model = ElasticBoundary(CLASSES).double(), Discriminator(WIDTH).double()
    embeddings, labels, *classes = sets(12, seed=5)
    old = torch.randn(12, WIDTH, dtype=torch.float64)
    rows = 12 // distributed.world_size()
    mine = slice(distributed.rank() * rows, (distributed.rank() + 1) * rows)
    new = embeddings[mine].detach().requires_grad_()
    p2s = point_to_set_loss(new, labels[mine], *classes, boundary, 0.4)
    adv = adversarial_loss(model, new, old[mine], 0.6)
    own = [torch.autograd.grad(loss, new, retain_graph=True)[0] for loss in (p2s, adv)]
    shared = torch.autograd.grad(p2s + adv, [*boundary.parameters(), *model.parameters()])
    shared = [distributed.all_reduce_(grad.clone()) for grad in shared]  # as the trainer does
    return torch.stack([p2s, adv]).detach(), own, shared, dict(model.state_dict())


def test_three_ranks_have_the_losses_and_gradients_of_one():
    losses, own, shared, state = losses_on_rank()
    assert losses.min() > 0.01 and all(grad.abs().max() > 1e-4 for grad in own)
    results = run_ranks(losses_on_rank, 3)
    for theirs in results:
        torch.testing.assert_close(theirs[0], losses, rtol=1e-10, atol=0)
        for grad, expected in zip(theirs[2], shared):
            torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-12)
        for name, value in state.items():
            torch.testing.assert_close(theirs[3][name], value, rtol=1e-8, atol=1e-12)
    for number, grad in enumerate(own):
        torch.testing.assert_close(torch.cat([theirs[1][number] for theirs in results]), grad, rtol=1e-8, atol=1e-12)


# --- whole runs -------------------------------------------------------------------------------------------------


def test_terms_are_weighted_and_fade(folder):
    """p2s as it is, times 4; adv times 4 and (E - epoch + 1) / E, epochs counted from 0; the reversal grows."""
    trainer = AdvBCT(load_config(write_config(folder, "AdvBCT", "run", num_epoch=35)))
    trainer.loader.set_epoch(0)
    batch = next(iter(trainer.loader))

    def terms(**state):
        for name, value in state.items():
            setattr(trainer, name, value)
        new = trainer.backbone(batch.images).detach().requires_grad_()
        trainer.backbone = lambda images: new
        named = trainer.losses(batch)
        (grad,) = torch.autograd.grad(named["adv"], new)
        return named, grad, new

    first, grad, new = terms(epoch=0, step=0)
    last, last_grad, _ = terms(epoch=34, step=trainer.total_steps // 2)
    p2s = point_to_set_loss(new, batch.labels, *trainer.classes, trainer.extra["boundary"], 0.4)
    adv = adversarial_loss(trainer.extra["discriminator"], new, batch.old, 0.0)
    torch.testing.assert_close(first["p2s"], 4 * p2s)
    torch.testing.assert_close(last["p2s"], 4 * p2s)
    torch.testing.assert_close(first["adv"], 4 * 36 / 35 * adv)
    torch.testing.assert_close(last["adv"], 4 * 2 / 35 * adv)
    assert not grad.any() and last_grad.any()
    trainer.cfg.normalize_input = False
    unnormalised, _, _ = terms(epoch=34)
    adv = adversarial_loss(trainer.extra["discriminator"], new, batch.old, 0.0, normalize_input=False)
    torch.testing.assert_close(unnormalised["adv"], 4 * 2 / 35 * adv)
    assert not torch.isclose(unnormalised["adv"], last["adv"], rtol=1e-3)


@pytest.mark.parametrize("largest", [0.5, 0.0])
def test_one_norm_clips_backbone_adversary_and_boundary(folder, largest):
    """A step of plain SGD: all gradients of the three divided by one number, the class centres' by none; 0 = none."""
    keys = {"clip_grad_norm": largest, "momentum": 0.0, "weight_decay": 0.0, "lr": 0.1, "adv_weight": 40.0}
    trainer = AdvBCT(load_config(write_config(folder, "AdvBCT", "run", **keys)))
    trainer.loader.set_epoch(0)
    trainer.step = trainer.total_steps // 2  # the reversal is on
    sum(trainer.losses(next(iter(trainer.loader))).values()).backward()
    backbone = [parameter for parameter in trainer.backbone.parameters() if parameter.requires_grad]
    together = [*backbone, *trainer.extra.parameters()]
    alone, norm = (math.sqrt(sum((p.grad.double() ** 2).sum().item() for p in part)) for part in (backbone, together))
    assert norm > 1.01 * alone and alone > 0.5  # the backbone's alone is another number
    factor = largest / norm if largest else 1.0
    expected = [parameter.detach() - 0.1 * factor * parameter.grad for parameter in together]
    centres = trainer.classifier.weight.detach() - 0.1 * trainer.classifier.weight.grad
    trainer.update()
    for parameter, value in zip(together, expected):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(trainer.classifier.weight.detach(), centres)


def test_train_script_on_two_ranks(folder):
    path = write_config(folder, "AdvBCT", "launched", batch_size=4, frequent=1, save_all_states=True)
    output = launch("AdvBCT", path)
    assert "Global Step: 6" in output and "p2s" in output and "adv" in output
    model = torch.load(folder / "launched" / "model.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in model.values())
    assert not any("elastic" in name or "discriminator" in name for name in model)
    paths = complete_sets(folder / "launched")[-1].glob("rank_*.pt")
    states = [torch.load(path, weights_only=True)["extra"] for path in paths]
    assert len(states) == 2 and states[0].keys() >= {"boundary.elastic", "discriminator.hidden.weight"}
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=1e-6)
    features, labels = np.load(folder / "old_feature.npy"), np.load(folder / "old_label.npy")
    with np.load(folder / "old_center_radius.npz") as file:
        for name, expected in zip(("centers", "radius", "count"), class_boundaries(features, labels, 5)):
            np.testing.assert_array_equal(file[name], expected)
