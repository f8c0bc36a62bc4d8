"""NCCL: both losses and the queue against slow loops, gradients on several ranks against one, whole runs."""

import math

import pytest
import torch

from BCT_methods.NCCL import loss as nccl_loss
from BCT_methods.NCCL.loss import NeighborhoodConsensusLoss
from BCT_methods.NCCL.train import NCCL
from core import distributed
from core.config import ConfigError, load_config
from engine.checkpoint import complete_sets
from losses import ArcFace, PartialFC
from tests.BCT_methods.whole_runs import REPO, launch, train, write_config
from tests.ranks import run_ranks

WIDTH, CLASSES = 6, 7


def batches(number, rows, seed=0, dtype=torch.float64):
    """`number` batches (old, old logits, new, new logits, labels); few labels, so that there are positives."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        old, new = torch.randn(2, rows, WIDTH, generator=generator, dtype=dtype) * 3
        old_logits, new_logits = torch.rand(2, rows, CLASSES, generator=generator, dtype=dtype) * 2 - 1
        labels = torch.randint(3, (rows,), generator=generator)
        yield old, old_logits, new.requires_grad_(), new_logits.requires_grad_(), labels


def slowly(queue, old, new, new_logits, labels, temperature):
    """Both losses by the definition; queue: a list of (unit embedding, logits, label), labels of -1 left out."""
    sums, used = [0.0, 0.0], 0
    for g, f, z, y in zip(old, new, new_logits, labels.tolist()):
        g, f = g / g.norm(), f / f.norm()
        positives = [j for j in range(len(queue)) if queue[j][2] == y]
        if not positives:
            continue
        used += 1
        for term, (mine, column) in enumerate(((f, 0), (z, 1))):
            products = [(mine * entry[column]).sum() / temperature for entry in queue]
            normaliser = torch.stack([product.exp() for product in products]).sum()
            for j in positives:
                weight = ((g * queue[j][0]).sum() + 1) / 2
                sums[term] = sums[term] - weight * (products[j].exp() / normaliser).log() / len(positives)
    return [total / max(used, 1) for total in sums]


def fill(queue, old, logits, labels, size):
    queue += [(g / g.norm(), z, y) for g, z, y in zip(old, logits, labels.tolist())]
    del queue[:-size]


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("size", [4, 7, 8, 50])  # batches of 4: one fits, wrap-around, two fit, never full
def test_losses_gradients_and_queue_against_loops(size, temperature):
    module, queue = NeighborhoodConsensusLoss(WIDTH, CLASSES, size, temperature).double(), []
    for old, old_logits, new, new_logits, labels in batches(6, 4):
        fill(queue, old, old_logits, labels, size)
        results = module(old, old_logits, new, new_logits, labels)
        expected = slowly(queue, old, new, new_logits, labels, temperature)
        torch.testing.assert_close(results, tuple(expected), rtol=1e-10, atol=1e-12)
        for result, reference, leaf in zip(results, expected, (new, new_logits)):
            (grad,) = torch.autograd.grad(result, leaf, retain_graph=True)
            assert grad.abs().max() > 1e-4
            torch.testing.assert_close(grad, torch.autograd.grad(reference, leaf)[0], rtol=1e-9, atol=1e-12)


def test_a_batch_larger_than_the_queue_leaves_its_last_rows():
    module, queue = NeighborhoodConsensusLoss(WIDTH, CLASSES, 5).double(), []
    for old, old_logits, new, new_logits, labels in batches(3, 13, seed=2):
        labels[:4] = 6  # their own old features are out again, no other has that label: they do not count
        fill(queue, old, old_logits, labels, 5)
        results = module(old, old_logits, new, new_logits, labels)
        expected = slowly(queue, old, new, new_logits, labels, 1.0)
        torch.testing.assert_close(results, tuple(expected), rtol=1e-10, atol=1e-12)
        assert sorted(module.queue_labels.tolist()) == sorted(labels[-5:].tolist())


def test_rows_of_label_minus_one_take_no_part():
    module = NeighborhoodConsensusLoss(WIDTH, CLASSES, 30).double()
    without = NeighborhoodConsensusLoss(WIDTH, CLASSES, 30).double()
    for old, old_logits, new, new_logits, labels in batches(3, 8, seed=1):
        known = torch.tensor([0, 2, 3, 5, 7])
        marked = torch.full_like(labels, -1)
        marked[known] = labels[known]
        results = module(old, old_logits, new, new_logits, marked)
        expected = without(old[known], old_logits[known], new[known], new_logits[known], labels[known])
        torch.testing.assert_close(results, expected, rtol=1e-12, atol=1e-12)
        (grad,) = torch.autograd.grad(sum(results), new)
        assert not grad[[1, 4, 6]].any() and grad[known].any(dim=1).all()


def test_nothing_to_compare_with_is_zero_without_nan():
    module = NeighborhoodConsensusLoss(WIDTH, CLASSES, 8)
    old, old_logits, new, new_logits, labels = next(batches(1, 4, dtype=torch.float32))
    results = module(old, old_logits, new, new_logits, torch.full_like(labels, -1))
    assert [result.item() for result in results] == [0, 0]
    sum(results).backward()
    assert not new.grad.any() and not new_logits.grad.any()


def test_the_order_within_a_batch_does_not_matter():
    first, second = (NeighborhoodConsensusLoss(WIDTH, CLASSES, 12).double() for _ in range(2))
    for old, old_logits, new, new_logits, labels in batches(4, 6):  # 12 slots hold whole batches
        order = torch.randperm(6)
        batch = old, old_logits, new, new_logits, labels
        torch.testing.assert_close(first(*batch), second(*(tensor[order] for tensor in batch)))


def test_a_new_neighbour_of_its_own_class_is_rewarded_and_of_another_not():
    """The sign: f on the old features of its class costs less than f on those of another."""
    module = NeighborhoodConsensusLoss(2, 2, 4)
    old = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    labels = torch.tensor([0, 0, 1, 1])
    good = module(old, old, old, old, labels)
    bad = module(old, old, -old, -old, labels)
    # By hand: w = 1; scores 1, 1, -1, -1 against -1, -1, 1, 1.
    for result, score in zip((*good, *bad), (1, 1, -1, -1)):
        assert result.item() == pytest.approx(math.log(2 * math.exp(1) + 2 * math.exp(-1)) - score, abs=1e-5)


def test_without_logits_the_embedding_loss_and_its_gradient_are_the_same_bits():
    both = NeighborhoodConsensusLoss(WIDTH, CLASSES, 10, 0.7)
    alone = NeighborhoodConsensusLoss(WIDTH, CLASSES, 10, 0.7, logit_dtype=None)
    assert set(both.state_dict()) - set(alone.state_dict()) == {"queue_logits"} and alone.class_sharded == {}
    for old, old_logits, new, new_logits, labels in batches(4, 4, dtype=torch.float32):  # more than the queue holds
        expected, _ = both(old, old_logits, new, new_logits, labels)
        result, logit = alone(old, None, new, None, labels)
        assert logit is None and torch.equal(result, expected)
        first, second = (torch.autograd.grad(loss, new)[0] for loss in (result, expected))
        assert torch.equal(first, second) and first.any()


def test_half_precision_products_stay_close(monkeypatch):
    monkeypatch.setattr(nccl_loss, "HALF_BLOCK", 3)  # 7 classes in three blocks
    exact = NeighborhoodConsensusLoss(WIDTH, CLASSES, 20)
    half = NeighborhoodConsensusLoss(WIDTH, CLASSES, 20, logit_dtype=torch.float16)
    for old, old_logits, new, new_logits, labels in batches(3, 6, dtype=torch.float32):
        expected, result = (module(old, old_logits, new, new_logits, labels)[1] for module in (exact, half))
        assert result.dtype == torch.float32 and half.queue_logits.dtype == torch.float16
        torch.testing.assert_close(result, expected, rtol=0, atol=5e-3)
        grads = [torch.autograd.grad(loss, new_logits)[0] for loss in (result, expected)]
        torch.testing.assert_close(*grads, rtol=0, atol=2e-3)


def test_a_saved_queue_goes_on_where_it_was():
    going, stream = NeighborhoodConsensusLoss(WIDTH, CLASSES, 7).double(), list(batches(5, 4))
    for batch in stream[:3]:
        going(*batch)
    loaded = NeighborhoodConsensusLoss(WIDTH, CLASSES, 7).double()
    loaded.load_state_dict(going.state_dict())
    for batch in stream[3:]:
        assert all(torch.equal(*pair) for pair in zip(going(*batch), loaded(*batch)))


def test_what_does_not_fit_is_named():
    module = NeighborhoodConsensusLoss(WIDTH, CLASSES, 7)
    old, old_logits, new, new_logits, labels = next(batches(1, 4, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"old_embeddings \[4, 5\] instead of \[4, 6\]"):
        module(old[:, :5], old_logits, new, new_logits, labels)
    with pytest.raises(ValueError, match=r"new_embeddings \[3, 6\] instead of \[4, 6\]"):
        module(old, old_logits, new[:3], new_logits, labels)
    with pytest.raises(ValueError, match=r"old_logits \[3, 7\] instead of \[4, 7\]"):
        module(old, old_logits[:3], new, new_logits, labels)
    with pytest.raises(ValueError, match=r"old_logits None instead of \[4, 7\], new_logits None instead"):
        module(old, None, new, None, labels)
    with pytest.raises(ValueError, match=r"old_logits \[4, 7\] instead of None"):
        NeighborhoodConsensusLoss(WIDTH, CLASSES, 7, logit_dtype=None)(old, old_logits, new, new_logits, labels)
    for size, temperature in ((0, 1.0), (5, 0.0)):
        with pytest.raises(ValueError, match="queue_size"):
            NeighborhoodConsensusLoss(WIDTH, CLASSES, size, temperature)


# --- ranks ------------------------------------------------------------------------------------------------------


def steps_on_rank(temperature):
    """Two steps on 6 rows of a global batch; the gradients of each loss to this rank's embeddings and class centres."""
    classifier = PartialFC(ArcFace(8.0), WIDTH, CLASSES, seed=1).double()
    module = NeighborhoodConsensusLoss(WIDTH, CLASSES, 9, temperature).double()
    alone = NeighborhoodConsensusLoss(WIDTH, CLASSES, 9, temperature, logit_dtype=None).double()
    rows = 6 // distributed.world_size()
    mine = slice(distributed.rank() * rows, (distributed.rank() + 1) * rows)
    out = []
    for old, _, new, _, labels in batches(2, 6):
        old, new, labels = old[mine], new[mine].detach().requires_grad_(), labels[mine]
        new_logits = classifier.cosines(distributed.gather_with_grad(new))
        with torch.no_grad():
            old_logits = classifier.cosines(distributed.gather(old))
        losses = module(old, old_logits, new, new_logits, labels)
        (embedding,) = torch.autograd.grad(losses[0], new, retain_graph=True)
        logit, centres = torch.autograd.grad(losses[1], (new, classifier.weight))
        without, _ = alone(old, None, new, None, labels)
        assert torch.equal(without, losses[0]) and torch.equal(torch.autograd.grad(without, new)[0], embedding)
        out.append((torch.stack(losses).detach(), embedding, logit, centres))
    return out


def test_three_ranks_have_the_losses_and_gradients_of_one():
    one = steps_on_rank(0.7)
    many = run_ranks(steps_on_rank, 3, 0.7)  # 7 classes: shards of unequal size
    for step, (losses, *grads) in enumerate(one):
        assert losses.unique().numel() == 2 and all(grad.abs().max() > 1e-5 for grad in grads)
        for result in many:
            torch.testing.assert_close(result[step][0], losses, rtol=1e-10, atol=0)
        for number, grad in enumerate(grads, start=1):
            parts = torch.cat([result[step][number] for result in many])
            torch.testing.assert_close(parts, grad, rtol=1e-8, atol=1e-12)


# --- whole runs -------------------------------------------------------------------------------------------------


def test_without_the_logit_loss_no_logits_are_computed_or_kept(folder):
    trainer = NCCL(load_config(write_config(folder, "NCCL", "run", alpha=8.0, beta=0.0, queue_size=30)))
    trainer.classifier.cosines = None  # the second pass through the classifier
    trainer.loader.set_epoch(0)
    batch = next(iter(trainer.loader))
    terms = trainer.losses(batch)
    assert list(terms) == ["cls", "embedding"]
    assert not any("logits" in name for name in trainer.extra.state_dict())
    alone = NeighborhoodConsensusLoss(8, 5, 30, logit_dtype=None)
    expected, _ = alone(batch.old, None, trainer.backbone(batch.images), None, batch.labels)
    torch.testing.assert_close(terms["embedding"], 8 * expected)


def test_both_losses_move_the_weights(folder):
    runs = {}
    for name, alpha, beta in (("both", 1.0, 0.01), ("embedding", 1.0, 0.0), ("logit", 0.0, 0.01), ("none", 0.0, 0.0)):
        path = write_config(folder, "NCCL", name, queue_size=30, num_epoch=1, alpha=alpha, beta=beta)
        runs[name] = train(NCCL, path)[0]["3.weight"]
    for first, second in (("both", "embedding"), ("both", "logit"), ("embedding", "none"), ("logit", "none")):
        assert not torch.allclose(runs[first], runs[second], rtol=0, atol=1e-7), (first, second)


def test_sampled_centres_only_without_the_logit_loss(folder):
    path = write_config(folder, "NCCL", "run", sample_rate=0.5, queue_size=30, num_epoch=1)
    with pytest.raises(ConfigError, match="sample_rate = 0.5; .* sample_rate = 1 or beta = 0"):
        NCCL(load_config(path))
    backbone, centres, _ = train(NCCL, path, "--beta", "0")
    assert all(torch.isfinite(value).all() for value in (*backbone.values(), centres))


def test_train_script_on_two_ranks(folder):
    path = write_config(folder, "NCCL", "launched", batch_size=4, frequent=1, queue_size=40, save_all_states=True)
    output = launch("NCCL", path)
    assert "Global Step: 6" in output and "embedding" in output and "logit" in output
    model = torch.load(folder / "launched" / "model.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in model.values()) and not any("queue" in name for name in model)
    paths = sorted(complete_sets(folder / "launched")[-1].glob("rank_*.pt"))
    states = [torch.load(path, weights_only=True) for path in paths]
    assert [state["extra"]["consensus.queue_logits"].shape for state in states] == [(40, 3), (40, 2)]
    assert (states[0]["extra"]["consensus.queue_labels"] >= 0).all()  # 6 steps of 8


def test_the_definition_and_the_published_run_differ_in_two_keys():
    demo = REPO / "BCT_methods/NCCL/configs/demo"
    published, definition, base = map(
        load_config,
        (
            demo / "OPclass_tiny_to_tiny_x2_NCCL_softmax_to_arc_f128.py",
            demo / "OPclass_tiny_to_tiny_x2_NCCLdefinition_softmax_to_arc_f128.py",
            demo.parent / "base.py",
        ),
    )
    different = {key for key in published if published[key] != definition[key]} - {"name", "config_file", "output"}
    assert different == {"alpha", "beta"} and (published.alpha, published.beta) == (8.0, 0.0)
    assert (definition.alpha, definition.beta) == (base.alpha, base.beta) == (1.0, 0.01)
