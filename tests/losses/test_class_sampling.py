"""PartialFC with sample_rate < 1: which classes a step sees, its loss, and what the optimiser does to the centres."""

import pytest
import torch

from losses import ArcFace, PartialFC
from tests.losses.test_partial_fc import SIZE, make, problem, share, slow
from tests.ranks import run_ranks


def step_on_rank(embeddings, weight, labels, sample_rate):
    """Loss, gradient of my embeddings, the sampled classes and the gradient of their centres."""
    classifier = make(ArcFace(16.0, 0.5), weight, sample_rate=sample_rate)
    mine = share(embeddings).requires_grad_()
    loss = classifier(mine, share(labels))
    loss.backward()
    grad = classifier.weight.grad.coalesce()
    return loss.detach(), mine.grad, grad.indices()[0] + classifier.class_start, grad.values(), classifier.num_local


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("classes, sample_rate", [(40, 0.5), (41, 0.75), (61, 0.9)])
def test_loss_is_the_softmax_over_the_sampled_classes(world_size, classes, sample_rate):
    embeddings, weight, labels = problem(classes)
    results = run_ranks(step_on_rank, world_size, embeddings, weight, labels, sample_rate)
    for _, _, sampled, _, num_local in results:
        assert len(sampled) == int(sample_rate * num_local)
        assert (sampled.diff() > 0).all()
    sampled = torch.cat([result[2] for result in results])
    assert torch.isin(labels, sampled).all()

    renumbered = torch.tensor([sampled.tolist().index(label) for label in labels.tolist()])
    loss, embedding_grad, weight_grad = slow(embeddings, weight[sampled], renumbered, s=16.0)
    for result in results:
        assert result[0].item() == results[0][0].item() == pytest.approx(loss.item(), rel=1e-9)
    torch.testing.assert_close(torch.cat([result[1] for result in results]), embedding_grad)
    torch.testing.assert_close(torch.cat([result[3] for result in results]), weight_grad)


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_positives_are_kept_even_where_they_exceed_the_rate(world_size):
    embeddings, weight, _ = problem(24)
    labels = torch.arange(12) * 2
    results = run_ranks(step_on_rank, world_size, embeddings, weight, labels, 0.1)
    assert torch.cat([result[2] for result in results]).tolist() == labels.tolist()


def test_with_every_class_present_it_equals_the_full_softmax():
    embeddings, weight, _ = problem(12)
    labels = torch.arange(12)
    full, sampled = make(ArcFace(), weight), make(ArcFace(), weight, sample_rate=0.3)
    loss, expected = sampled(embeddings, labels), full(embeddings, labels)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert torch.equal(sampled.weight.grad.to_dense(), full.weight.grad)


def test_a_shard_without_positives_still_takes_part():
    embeddings, weight, _ = problem(10)
    labels = torch.zeros(12, dtype=torch.long)              # rank 1 owns none, and int(0.1 * 5) is 0
    (loss, _, first, _, _), (other, _, second, _, _) = run_ranks(step_on_rank, 2, embeddings, weight, labels, 0.1)
    assert first.tolist() == [0] and len(second) == 1 and second[0] >= 5
    assert loss == other and loss > 0


def sampled_rows(classifier, labels):
    classifier.weight.grad = None
    classifier(torch.ones(len(labels), SIZE, dtype=classifier.weight.dtype), labels).backward()
    return classifier.weight.grad.coalesce().indices()[0]


def test_negatives_are_drawn_evenly_and_anew():
    _, weight, _ = problem(20)
    classifier = make(ArcFace(), weight, sample_rate=0.5)
    counts = torch.zeros(20)
    for _ in range(400):
        counts[sampled_rows(classifier, torch.tensor([3]))] += 1
    assert counts[3] == 400
    others = torch.cat([counts[:3], counts[4:]])
    expected = 400 * 9 / 19                                 # 189 +- 10; five standard deviations
    assert (others - expected).abs().max() < 50


def test_sampling_is_seeded_and_can_be_restored():
    _, weight, labels = problem(50)
    first, same = (make(ArcFace(), weight, sample_rate=0.4, seed=1) for _ in range(2))
    other = make(ArcFace(), weight, sample_rate=0.4, seed=2)
    torch.manual_seed(5)                                    # the global generator plays no part
    rows = [sampled_rows(first, labels).tolist() for _ in range(3)]
    state = first.generator_state()
    later = [sampled_rows(first, labels).tolist() for _ in range(3)]
    torch.manual_seed(6)
    assert [sampled_rows(same, labels).tolist() for _ in range(3)] == rows
    assert sampled_rows(other, labels).tolist() != rows[0]
    assert len({tuple(drawn) for drawn in rows + later}) == 6
    other.set_generator_state(state)
    assert [sampled_rows(other, labels).tolist() for _ in range(3)] == later


def draw_on_rank():
    return sampled_rows(make(ArcFace(), problem(100)[1], sample_rate=0.4), torch.tensor([0, 50])).tolist()


def test_ranks_draw_differently():
    first, second = run_ranks(draw_on_rank, 2)
    assert len(first) == len(second) == 20 and first != second


def test_without_sampling_there_is_no_state_and_nothing_to_attach():
    classifier = PartialFC(ArcFace(), SIZE, 10)
    assert classifier.generator_state() is None
    classifier.set_generator_state(None)
    assert classifier.attach(torch.optim.SGD(classifier.parameters(), lr=0.1)) is None


def test_evaluation_uses_every_class():
    embeddings, weight, labels = problem(30)
    classifier = make(ArcFace(), weight, sample_rate=0.4).eval()
    assert torch.equal(classifier(embeddings, labels), make(ArcFace(), weight)(embeddings, labels))
    assert classifier.cosines(embeddings).shape == (12, 30)


def train_on_rank(name, accumulate):
    """Some steps of sampled training, beside dense SGD or AdamW arithmetic on the sampled rows alone."""
    embeddings, weight, labels = problem(41)
    classifier = make(ArcFace(8.0, 0.3), weight, sample_rate=0.5)
    if name == "sgd":
        optimizer = torch.optim.SGD(classifier.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01)
    else:
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=0.05, weight_decay=0.1)
    classifier.attach(optimizer)
    expected = classifier.weight.detach().clone()
    first, second = torch.zeros_like(expected), torch.zeros_like(expected)
    for step in range(1, 7):
        for micro in range(accumulate):
            drawn = (labels + 5 * step + 11 * micro) % 41
            (classifier(share(embeddings + 0.1 * step), share(drawn)) / accumulate).backward()
        grad = classifier.weight.grad.coalesce()
        rows, values = grad.indices()[0], grad.values().clone()
        optimizer.step()
        optimizer.zero_grad()
        if name == "sgd":
            first[rows] = 0.9 * first[rows] + values + 0.01 * expected[rows]
            expected[rows] -= 0.3 * first[rows]
        else:
            first[rows] = 0.9 * first[rows] + 0.1 * values
            second[rows] = 0.999 * second[rows] + 0.001 * values ** 2
            moved = (first[rows] / (1 - 0.9 ** step)) / ((second[rows] / (1 - 0.999 ** step)).sqrt() + 1e-8)
            expected[rows] -= 0.05 * (0.1 * expected[rows] + moved)
        assert len(rows) < classifier.num_local         # a step that touches every row would prove nothing
    state = optimizer.state[classifier.weight]
    return classifier.weight.detach(), expected, state["momentum_buffer" if name == "sgd" else "exp_avg"], first


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name, accumulate", [("sgd", 1), ("adamw", 1), ("sgd", 2)])
def test_training_keeps_each_centres_own_state(world_size, name, accumulate):
    for weight, expected, state, expected_state in run_ranks(train_on_rank, world_size, name, accumulate):
        torch.testing.assert_close(weight, expected, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(state, expected_state, rtol=1e-8, atol=1e-10)


def test_forgetting_to_attach_does_not_pass_silently():
    embeddings, weight, labels = problem(30)
    for make_optimizer in (lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.1)):
        classifier = make(ArcFace(), weight, sample_rate=0.4)
        optimizer = make_optimizer(classifier.parameters())
        classifier(embeddings, labels).backward()
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()
