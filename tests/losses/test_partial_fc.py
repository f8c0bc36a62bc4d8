"""PartialFC on 1, 2 and 3 ranks against the plain softmax over all classes in one process."""

import math

import pytest
import torch
import torch.nn.functional as F

from core import distributed
from losses import ArcFace, CombinedMarginLoss, CosFace, PartialFC
from losses.partial_fc import _HalfCosines
from tests.pretend_cuda import pretend_cuda
from tests.ranks import run_ranks

BATCH, SIZE = 12, 8  # global batch, embedding size


def problem(classes, dtype=torch.float64, seed=0):
    """Embeddings [12, 8] of any scale, centres [C, 8], labels [12]."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(BATCH, SIZE, dtype=torch.float64, generator=generator) * 3
    weight = torch.randn(classes, SIZE, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, classes, (BATCH,), generator=generator)
    weight[labels[:6]] += embeddings[:6]  # some samples are near their centre, as in training
    weight[labels[6]] -= 3 * embeddings[6]  # and one is past ArcFace's pi - m
    return embeddings.to(dtype), weight.to(dtype), labels


def slow(embeddings, weight, labels, s=64.0, m1=1.0, m2=0.5, m3=0.0):
    """Loss and gradients, the margin applied sample by sample, with arccos and autograd; softmax over all classes."""
    embeddings, weight = (tensor.double().clone().requires_grad_() for tensor in (embeddings, weight))
    losses = []
    for embedding, label in zip(embeddings, labels.tolist()):
        cosines = [(embedding @ row) / (embedding.norm() * row.norm()) for row in weight]
        target = cosines[label]
        if m1 == 1 and m3 == 0 and target <= math.cos(math.pi - m2):
            cosines[label] = target - m2 * math.sin(math.pi - m2)
        else:
            cosines[label] = torch.cos(m1 * torch.acos(target) + m2) - m3
        losses.append(F.cross_entropy(s * torch.stack(cosines)[None], torch.tensor([label])))
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.detach(), embeddings.grad, weight.grad


def share(tensor):
    return tensor.chunk(distributed.world_size())[distributed.rank()].clone()


def make(margin, weight, **options):
    """A PartialFC whose centres are this rank's rows of `weight`."""
    classifier = PartialFC(margin, SIZE, len(weight), **options).to(weight.dtype)
    rows = slice(classifier.class_start, classifier.class_start + classifier.num_local)
    classifier.load_state_dict({"weight": weight[rows]})
    return classifier


def loss_on_rank(margin, embeddings, weight, labels, options):
    classifier = make(margin, weight, **options)
    mine = share(embeddings).requires_grad_()
    loss = classifier(mine, share(labels))
    loss.backward()
    return loss.detach(), mine.grad, classifier.weight.grad, classifier.class_start


def check_against_slow(results, expected, tolerance):
    loss, embedding_grad, weight_grad = expected
    for value, _, _, _ in results:
        assert value.item() == results[0][0].item()  # bit for bit the same on every rank
        assert value.item() == pytest.approx(loss.item(), rel=tolerance)
    got = torch.cat([grad for _, grad, _, _ in results]).double()
    torch.testing.assert_close(got, embedding_grad, rtol=tolerance, atol=tolerance)
    got = torch.cat([grad for _, _, grad, _ in results]).double()
    torch.testing.assert_close(got, weight_grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("classes", [7, 10, 11])
def test_loss_and_gradients_equal_the_plain_softmax(world_size, classes):
    data = problem(classes)
    expected = slow(*data)
    results = run_ranks(loss_on_rank, world_size, ArcFace(), *data, {})
    check_against_slow(results, expected, 1e-9)
    sizes = [len(grad) for _, _, grad, _ in results]
    assert sum(sizes) == classes and max(sizes) - min(sizes) <= 1
    assert [start for _, _, _, start in results] == [sum(sizes[:rank]) for rank in range(world_size)]

    single = problem(classes, torch.float32)
    check_against_slow(run_ranks(loss_on_rank, world_size, ArcFace(), *single, {"fp16": True}), expected, 1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "margin, numbers",
    [
        (CosFace(30.0, 0.3), dict(s=30.0, m1=1.0, m2=0.0, m3=0.3)),
        (CombinedMarginLoss(20.0, 0.9, 0.3, 0.1), dict(s=20.0, m1=0.9, m2=0.3, m3=0.1)),
    ],
)
def test_other_margins(world_size, margin, numbers):
    data = problem(10, seed=1)
    check_against_slow(run_ranks(loss_on_rank, world_size, margin, *data, {}), slow(*data, **numbers), 1e-9)


def test_gradcheck():
    embeddings, weight, labels = problem(7)
    classifier = make(ArcFace(8.0, 0.5), weight)

    def loss(embeddings, weight):
        return torch.func.functional_call(classifier, {"weight": weight}, (embeddings, labels))

    assert torch.autograd.gradcheck(loss, (embeddings.requires_grad_(), weight.requires_grad_()))


def test_finite_where_embeddings_lie_on_centres():
    _, weight, labels = problem(10, torch.float32)
    labels = torch.arange(10)
    for sign in (1, -1):
        classifier = make(ArcFace(), weight)
        embeddings = (sign * 5 * weight).requires_grad_()
        loss = classifier(embeddings, labels)
        loss.backward()
        assert loss.isfinite() and embeddings.grad.isfinite().all() and classifier.weight.grad.isfinite().all()


def test_finite_with_extreme_scales():
    embeddings, weight, labels = problem(10, torch.float32)
    classifier = make(ArcFace(1e4, 0.5), weight)  # logits of 10000: exp would overflow without the maximum
    embeddings.requires_grad_()
    classifier(embeddings, labels).backward()
    assert embeddings.grad.isfinite().all() and classifier.weight.grad.isfinite().all()


def test_scales_and_order_do_not_matter():
    embeddings, weight, labels = problem(10)
    loss = make(ArcFace(), weight)(embeddings, labels)
    rows, classes = torch.randperm(BATCH), torch.randperm(10)
    scale = torch.rand(BATCH, 1, dtype=torch.float64) * 100 + 0.01
    torch.testing.assert_close(make(ArcFace(), weight)(embeddings * scale, labels), loss)
    torch.testing.assert_close(make(ArcFace(), weight * 0.001)(embeddings, labels), loss)
    torch.testing.assert_close(make(ArcFace(), weight)(embeddings[rows], labels[rows]), loss)
    torch.testing.assert_close(make(ArcFace(), weight[classes])(embeddings, classes.argsort()[labels]), loss)


def test_half_precision_embeddings_and_autocast_compute_in_float32():
    embeddings, weight, labels = problem(10, torch.float32)
    classifier = make(ArcFace(), weight)
    expected = classifier(embeddings, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classifier(embeddings, labels), expected)
    half = embeddings.half().requires_grad_()
    loss = classifier(half, labels.int().unsqueeze(1))
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == torch.float16
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)


def test_half_precision_cosines_are_near_the_exact_ones():
    """The arithmetic that only CUDA uses, run on the CPU."""
    embeddings, weight, _ = problem(11, torch.float32)
    upstream = torch.randn(BATCH, 11, generator=torch.Generator().manual_seed(1))
    results = []
    for compute in (lambda e, w: _HalfCosines.apply(e, w).float(), lambda e, w: F.linear(e, F.normalize(w))):
        leaves = [F.normalize(embeddings).requires_grad_(), (0.01 * weight).requires_grad_()]
        cosines = compute(*leaves)
        cosines.backward(upstream)
        results.append((cosines.detach(), leaves[0].grad, leaves[1].grad))
    for got, expected in zip(*results):
        assert got.dtype == torch.float32
        assert (got - expected).norm() <= 2e-3 * expected.norm()


class Seen(ArcFace):
    """Keeps the cosines that it was given."""

    def forward(self, logits, labels):
        self.cosines = logits.detach().cpu()
        return super().forward(logits, labels)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 1e-6)])
def test_what_reaches_the_margin_on_cuda(dtype, tolerance):
    """bfloat16 would round cosines to steps of 2**-8 near 1, and s = 64 makes 0.25 of that."""
    embeddings, weight, labels = problem(11, torch.float32)
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", dtype)
    try:
        with pretend_cuda():
            classifier = make(Seen(), weight, fp16=True).to("cuda")
            classifier(embeddings.to("cuda"), labels.to("cuda")).backward()
    finally:
        torch.set_autocast_dtype("cuda", before)
    expected = F.cosine_similarity(embeddings.double()[:, None], weight.double()[None], dim=2)
    cosines = classifier.margin_loss.cosines
    assert cosines.dtype == torch.float32
    torch.testing.assert_close(cosines.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("fp16, tolerance", [(False, 1e-4), (True, 2e-2)])
def test_cuda_agrees_with_the_cpu(fp16, tolerance):
    embeddings, weight, labels = problem(10, torch.float32)
    loss, embedding_grad, weight_grad = slow(embeddings, weight, labels)
    classifier = make(ArcFace(), weight, fp16=fp16).cuda()
    mine = embeddings.cuda().requires_grad_()
    value = classifier(mine, labels.cuda())
    value.backward()
    assert value.item() == pytest.approx(loss.item(), rel=tolerance)
    for got, expected in ((mine.grad, embedding_grad), (classifier.weight.grad, weight_grad)):
        assert (got.cpu().double() - expected).norm() <= tolerance * expected.norm()


def cosines_on_rank(embeddings, weight):
    classifier = make(ArcFace(), weight)
    mine = share(embeddings).requires_grad_()
    cosines = classifier.cosines(distributed.gather_with_grad(mine))
    (cosines**3).sum().backward()
    return cosines.detach(), mine.grad, classifier.weight.grad


@pytest.mark.parametrize("world_size", [1, 3])
def test_cosines_to_the_shard_with_gradients(world_size):
    embeddings, weight, _ = problem(10)
    results = run_ranks(cosines_on_rank, world_size, embeddings, weight)
    embeddings.requires_grad_()
    weight.requires_grad_()
    expected = F.cosine_similarity(embeddings[:, None], weight[None], dim=2)
    (expected**3).sum().backward()
    torch.testing.assert_close(torch.cat([cosines for cosines, _, _ in results], 1), expected.detach())
    torch.testing.assert_close(torch.cat([grad for _, grad, _ in results]), embeddings.grad)
    torch.testing.assert_close(torch.cat([grad for _, _, grad in results]), weight.grad)


def bad_label_on_rank(label):
    embeddings, weight, labels = problem(7)
    if distributed.rank() == 0:
        labels[0] = label
    try:
        make(ArcFace(), weight)(share(embeddings), share(labels))
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("label", [7, -1])
def test_a_label_out_of_range_stops_every_rank(label):
    for message in run_ranks(bad_label_on_rank, 2, label):
        assert f"label {label} is outside [0, 7)" in message


def too_few_classes_on_rank():
    with pytest.raises(ValueError, match="1 classes are fewer than the 2 ranks"):
        PartialFC(ArcFace(), SIZE, 1)


def test_wrong_arguments_are_named():
    run_ranks(too_few_classes_on_rank, 2)
    with pytest.raises(ValueError, match="sample_rate"):
        PartialFC(ArcFace(), SIZE, 10, sample_rate=0)
    embeddings, weight, labels = problem(10)
    classifier = make(ArcFace(), weight)
    with pytest.raises(ValueError, match=r"expected embeddings \[B, 8\]"):
        classifier(embeddings[:, :5], labels)
    with pytest.raises(ValueError, match=r"labels \[B\]"):
        classifier(embeddings, labels[:5])


def initial_weight_on_rank(classes):
    return PartialFC(ArcFace(), SIZE, classes, seed=3).weight.detach()


def test_initial_centres_do_not_depend_on_the_number_of_ranks():
    classes = 2500  # more than two blocks of the initialisation
    whole = initial_weight_on_rank(classes)
    assert torch.equal(torch.cat(run_ranks(initial_weight_on_rank, 3, classes)), whole)
    assert abs(whole.mean()) < 5e-4 and abs(whole.std() - 0.01) < 5e-4
    assert len(whole.unique(dim=0)) == classes
    assert not torch.equal(whole, PartialFC(ArcFace(), SIZE, classes, seed=4).weight)
