"""PartialFC with sample_rate < 1: which classes a step sees, its loss, and what the optimiser does to the centres."""

import io

import pytest
import torch

from core.distributed import rows_of_rank, to_device
from losses import ArcFace, PartialFC
from tests.losses.test_partial_fc import SIZE, make, problem, share, slow
from tests.losses.test_row_optimizer import SlowAdamW, SlowSGD
from tests.pretend_cuda import pretend_cuda
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
def test_all_positives_are_kept_even_beyond_the_rate(world_size):
    embeddings, weight, _ = problem(24)
    labels = torch.arange(12) * 2
    results = run_ranks(step_on_rank, world_size, embeddings, weight, labels, 0.1)
    assert torch.cat([result[2] for result in results]).tolist() == labels.tolist()


def sample_on_cuda(labels, classes, rate):
    """Classes sampled on this rank, on a CUDA that is not there, and how often the host waited for it."""
    with pretend_cuda() as watch:
        classifier = PartialFC(ArcFace(), SIZE, classes, rate).to("cuda")
        labels, embeddings = (to_device(share(tensor), "cuda") for tensor in (labels, torch.ones(len(labels), SIZE)))
        classifier._sampling_generator()
        watch.waits.clear()
        sampled = []
        sample = classifier._sample
        classifier._sample = lambda local: sampled.append(sample(local)) or sampled[0]
        classifier(embeddings, labels)
        waits = [str(place) for place in watch.waits]
        return waits, sampled[0][0].cpu() + classifier.class_start, sampled[0][1].cpu()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("classes, count", [(24, 12), (100, 12), (400, 20), (10, 12)])
def test_on_cuda_no_step_waits_for_the_number_of_positives(world_size, classes, count):
    """Where the global batch is larger than the sample, as many classes as it has images, at most all of them."""
    labels = torch.tensor([0, 9, 9, 3, 7, 1, 1, 5, 0, 8, 2, 9]) * classes // 10
    count = count if world_size == 1 else 12
    for rank, (waits, sampled, local) in enumerate(run_ranks(sample_on_cuda, world_size, labels, classes, 0.05)):
        start, stop = rows_of_rank(classes, rank, world_size)
        own = (labels >= start) & (labels < stop)
        assert waits == []
        assert len(sampled) == min(count, stop - start) and (sampled.diff() > 0).all()
        assert torch.equal(sampled[local[own]], labels[own]) and (local[~own] == -1).all()


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
    labels = torch.zeros(12, dtype=torch.long)  # rank 1 owns none, and int(0.1 * 5) is 0
    (loss, _, first, _, _), (other, _, second, _, _) = run_ranks(step_on_rank, 2, embeddings, weight, labels, 0.1)
    assert first.tolist() == [0] and len(second) == 1 and second[0] >= 5
    assert loss == other and loss > 0


def sampled_rows(classifier, labels):
    classifier.weight.grad = None
    classifier(torch.ones(len(labels), SIZE, dtype=classifier.weight.dtype), labels).backward()
    return classifier.weight.grad.coalesce().indices()[0]


def test_negatives_are_drawn_uniformly_in_each_step():
    _, weight, _ = problem(20)
    classifier = make(ArcFace(), weight, sample_rate=0.5)
    counts = torch.zeros(20)
    for _ in range(400):
        counts[sampled_rows(classifier, torch.tensor([3]))] += 1
    assert counts[3] == 400
    others = torch.cat([counts[:3], counts[4:]])
    expected = 400 * 9 / 19  # 189 +- 10; five standard deviations
    assert (others - expected).abs().max() < 50


def test_sampling_is_seeded_and_can_be_restored():
    _, weight, labels = problem(50)
    first, same = (make(ArcFace(), weight, sample_rate=0.4, seed=1) for _ in range(2))
    other = make(ArcFace(), weight, sample_rate=0.4, seed=2)
    torch.manual_seed(5)  # the global generator must not matter
    rows = [sampled_rows(first, labels).tolist() for _ in range(3)]
    state = first.sampling_state()
    later = [sampled_rows(first, labels).tolist() for _ in range(3)]
    torch.manual_seed(6)
    assert [sampled_rows(same, labels).tolist() for _ in range(3)] == rows
    assert sampled_rows(other, labels).tolist() != rows[0]
    assert len({tuple(drawn) for drawn in rows + later}) == 6
    other.set_sampling_state(state)
    assert [sampled_rows(other, labels).tolist() for _ in range(3)] == later


def draw_on_rank():
    return sampled_rows(make(ArcFace(), problem(100)[1], sample_rate=0.4), torch.tensor([0, 50])).tolist()


def test_ranks_draw_differently():
    first, second = run_ranks(draw_on_rank, 2)
    assert len(first) == len(second) == 20 and first != second


def test_without_sampling_there_is_no_state_and_nothing_to_attach():
    classifier = PartialFC(ArcFace(), SIZE, 10)
    assert classifier.sampling_state() is None
    classifier.set_sampling_state(None)
    assert classifier.attach(torch.optim.SGD(classifier.parameters(), lr=0.1)) is None


def test_evaluation_uses_every_class():
    embeddings, weight, labels = problem(30)
    classifier = make(ArcFace(), weight, sample_rate=0.4).eval()
    assert torch.equal(classifier(embeddings, labels), make(ArcFace(), weight)(embeddings, labels))
    assert classifier.cosines(embeddings).shape == (12, 30)


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, SlowSGD, dict(lr=0.3, momentum=0.9, weight_decay=0.01)),
    "adamw": (torch.optim.AdamW, SlowAdamW, dict(lr=0.05, weight_decay=0.1)),
}
TABLES = {"momentum_buffer": "buffer", "exp_avg": "first", "exp_avg_sq": "second"}  # names in the slow optimisers


def start(name, sample_rate):
    make_optimizer, slow_optimizer, options = OPTIMIZERS[name]
    classifier = make(ArcFace(8.0, 0.3), problem(41)[1], sample_rate=sample_rate)
    optimizer = make_optimizer(classifier.parameters(), **options)
    classifier.attach(optimizer)
    return classifier, optimizer, slow_optimizer(classifier.weight.detach().clone(), **options)


def tables(classifier, optimizer):
    """The centres and each table of the optimiser's state, by name."""
    state = optimizer.state.get(classifier.weight, {})
    return {"weight": classifier.weight.detach().clone(), **{key: state[key].clone() for key in TABLES if key in state}}


def saved_and_loaded(name, classifier, optimizer):
    """New ones, loaded from a checkpoint of these."""
    file = io.BytesIO()
    torch.save([classifier.state_dict(), classifier.sampling_state(), optimizer.state_dict()], file)
    file.seek(0)
    weight, generator, state = torch.load(file, weights_only=True)
    classifier, optimizer, _ = start(name, classifier.sample_rate)
    classifier.load_state_dict(weight)
    classifier.set_sampling_state(generator)
    optimizer.load_state_dict(state)
    return classifier, optimizer


def train_on_rank(name, accumulate, save_at):
    """Six steps of sampled training against a row-by-row optimiser; returns `tables`."""
    embeddings, _, labels = problem(41)
    classifier, optimizer, expected = start(name, 0.5)
    for step in range(6):
        if step == save_at:
            classifier, optimizer = saved_and_loaded(name, classifier, optimizer)
        for micro in range(accumulate):
            drawn = (labels + 5 * step + 11 * micro) % 41
            (classifier(share(embeddings + 0.1 * step), share(drawn)) / accumulate).backward()
        gradient, before = classifier.weight.grad.coalesce(), tables(classifier, optimizer)
        rows, values = gradient.indices()[0], gradient.values().clone()
        optimizer.step()
        optimizer.zero_grad()
        expected.step(dict(zip(rows.tolist(), values)))
        untouched = [row for row in range(classifier.num_local) if row not in rows]
        assert untouched  # a step that touches every row would prove nothing
        after = tables(classifier, optimizer)
        for key, value in before.items():
            assert torch.equal(after[key][untouched], value[untouched]), key
        torch.testing.assert_close(after["weight"], expected.weight, rtol=1e-8, atol=1e-10)
        for key in after.keys() & TABLES:
            torch.testing.assert_close(after[key], getattr(expected, TABLES[key]), rtol=1e-8, atol=1e-10)
    return after


def train_through_and_in_parts(name, accumulate):
    return train_on_rank(name, accumulate, None), train_on_rank(name, accumulate, 3)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name, accumulate", [("sgd", 1), ("adamw", 1), ("sgd", 2)])
def test_each_centre_keeps_its_state_also_through_a_checkpoint(world_size, name, accumulate):
    for whole, parts in run_ranks(train_through_and_in_parts, world_size, name, accumulate):
        assert whole.keys() == parts.keys() and len(whole) > 1
        assert all(torch.equal(parts[key], value) for key, value in whole.items())


def spread_labels(step):
    """Twelve classes of 41, spread evenly, others in every step."""
    return (torch.arange(12) * 41 // 12 + step) % 41


def train_on_positives(name):
    """Five steps that sample only the positives; the losses and `tables`."""
    embeddings, _, _ = problem(41)
    classifier, optimizer, _ = start(name, 0.01)
    losses = []
    for step in range(5):
        loss = classifier(share(embeddings + 0.1 * step), share(spread_labels(step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), tables(classifier, optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_number_of_ranks_takes_the_steps_of_a_plain_loop(name):
    """Without random negatives, shards of 41, 21 or 11 and 10 classes give the same softmax."""
    embeddings, _, _ = problem(41)
    _, _, expected = start(name, 0.01)
    losses = []
    for step in range(5):
        rows = spread_labels(step)
        loss, _, gradient = slow(embeddings + 0.1 * step, expected.weight[rows], torch.arange(12), s=8.0, m2=0.3)
        expected.step(dict(zip(rows.tolist(), gradient)))
        losses.append(loss)
    for world_size in (1, 2, 4):
        results = run_ranks(train_on_positives, world_size, name)
        for result in results:
            torch.testing.assert_close(result[0], torch.stack(losses), rtol=1e-9, atol=0)
        for key in results[0][1]:
            got = torch.cat([result[1][key] for result in results])
            torch.testing.assert_close(got, getattr(expected, TABLES.get(key, key)), rtol=1e-8, atol=1e-10)


def test_forgetting_attach_raises():
    embeddings, weight, labels = problem(30)
    for make_optimizer in (lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.1)):
        classifier = make(ArcFace(), weight, sample_rate=0.4)
        optimizer = make_optimizer(classifier.parameters())
        classifier(embeddings, labels).backward()
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()
