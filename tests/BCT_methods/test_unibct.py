"""UniBCT: the refinement against the paper's formula, and what it does to outliers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from BCT_methods.UniBCT import prototypes as unibct
from BCT_methods.UniBCT.prototypes import image_weights, refine_prototypes
from losses import old_prototype_loss


def transition(new, temperature=0.05, axis=1):
    """E of one class, [n, n]; axis 1: rows sum to 1, as the method wants it; 0: columns do."""
    new = new / np.linalg.norm(new, axis=1, keepdims=True)
    raised = np.exp(new @ new.T / temperature)
    np.fill_diagonal(raised, 0)
    return raised / raised.sum(axis=axis, keepdims=True)


def slowly(old, new, labels, damping=0.9, temperature=0.05, normalize=False, axis=1):
    """The formula as it stands, class by class, with the inverse."""
    prototypes = []
    for c in range(labels.max() + 1):
        V, N = old[labels == c].astype(np.float64), new[labels == c].astype(np.float64)
        if len(V) > 1:
            V = (1 - damping) * np.linalg.inv(np.eye(len(V)) - damping * transition(N, temperature, axis)) @ V
        mean = V.mean(axis=0)
        prototypes.append(mean / np.linalg.norm(mean) if normalize else mean)
    return np.stack(prototypes)


def class_means(old, labels):
    return np.stack([old[labels == c].mean(axis=0, dtype=np.float64) for c in range(labels.max() + 1)])


def apart(result, expected):
    """By row: the largest difference of a value, as a part of the norm of the expected row."""
    result, expected = (np.asarray(rows, dtype=np.float64) for rows in (result, expected))
    assert result.shape == expected.shape
    return np.abs(result - expected).max(axis=1) / np.linalg.norm(expected, axis=1)


def draw(sizes, width=6, seed=0, dtype=np.float64):
    """Old and new features of classes of these sizes, and labels in random order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    old, new = (rng.normal(size=(len(sizes), width))[labels] + rng.normal(size=(len(labels), width)) for _ in range(2))
    return (3 * old).astype(dtype), (2 * new).astype(dtype), labels


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    seed=st.integers(0, 999),
    damping=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    temperature=st.sampled_from([0.05, 0.2, 1.0]),
    normalize=st.booleans(),
)
def test_equals_the_formula(sizes, seed, damping, temperature, normalize):
    old, new, labels = draw(sizes, seed=seed)
    result = refine_prototypes(old, new, labels, damping, temperature, normalize)
    assert apart(result, slowly(old, new, labels, damping, temperature, normalize)).max() < 1e-10


def test_the_raw_means_are_the_default_and_their_norm_is_a_scale():
    """So long as the prototypes are not normalised, old features that are c times as long are a `scale` of c."""
    old, new, labels = draw([5, 1, 8, 3])
    embeddings, classes = torch.from_numpy(new), torch.from_numpy(labels)

    def loss(length, scale, **keys):
        prototypes = refine_prototypes(length * old, new, labels, **keys)
        return old_prototype_loss(embeddings, classes, prototypes, scale).item()

    for c in (0.1, 3.0, 16.0):
        assert loss(c, 1.0) == pytest.approx(loss(1.0, c), rel=1e-12)
        assert loss(c, 1.0) != pytest.approx(loss(1.0, 1.0), rel=1e-2)
        assert loss(c, 1.0, normalize=True) == pytest.approx(loss(1.0, 1.0, normalize=True), rel=1e-12)


def test_batches_and_chunks_of_any_size_give_the_same(monkeypatch):
    old, new, labels = draw([9, 1, 30, 2, 8, 8, 31, 1, 25, 7, 10], seed=1)
    whole = refine_prototypes(old, new, labels)
    for chunk in (6, 6 * 20, 6 * 60):
        for batch in (1, 500, 5000):
            monkeypatch.setattr(unibct, "CHUNK_VALUES", chunk)
            monkeypatch.setattr(unibct, "BATCH_VALUES", batch)
            torch.testing.assert_close(refine_prototypes(old, new, labels), whole, rtol=0, atol=1e-12)


def test_classes_of_several_hundred_images_beside_small_ones_in_float32():
    old, new, labels = draw([700, 3, 250, 690, 1, 2], width=32, dtype=np.float32)
    result = refine_prototypes(old, new, labels)
    assert result.dtype == torch.float32
    assert apart(result, slowly(old, new, labels)).max() < 2e-6


def test_with_columns_normalised_nothing_would_be_refined():
    """1ᵀE = 1ᵀ makes 1ᵀ(1 − λ)(I − λE)⁻¹ = 1ᵀ: the mean is the plain one. So rows it must be."""
    old, new, labels = draw([8, 20, 3])
    assert apart(slowly(old, new, labels, axis=0), class_means(old, labels)).max() < 1e-12
    assert apart(refine_prototypes(old, new, labels), class_means(old, labels)).min() > 1e-2


def test_an_outlier_of_a_class_loses_weight():
    rng = np.random.default_rng(0)
    new = np.ones((10, 16)) + 0.3 * rng.normal(size=(10, 16))
    new[7] = rng.normal(size=16)
    labels = np.zeros(10, int)
    weights = refine_prototypes(np.eye(10), new, labels).numpy()[0]  # old features that show who contributed
    assert weights.sum() == pytest.approx(1)
    assert weights.min() >= 0 and weights.argmin() == 7
    assert weights[7] < 0.25 / 10  # less than a quarter of its share in the plain mean

    old = np.ones((10, 16)) + 0.3 * rng.normal(size=(10, 16))
    old[7] = -5
    without = class_means(np.delete(old, 7, axis=0), labels[1:])[0]
    both = refine_prototypes(old, new, labels).numpy()[0], class_means(old, labels)[0]
    refined, plain = (1 - mean @ without / np.linalg.norm(mean) / np.linalg.norm(without) for mean in both)
    assert refined < plain / 4  # how far the outlier turns the prototype, 1 - cosine


def test_weights_are_those_of_the_formula_and_padding_has_none():
    new = torch.nn.functional.normalize(torch.from_numpy(draw([7])[1]), dim=1)
    valid = torch.tensor([[True] * 7, [True] * 4 + [False] * 3, [True] + [False] * 6])
    weights = image_weights(new.expand(3, 7, 6), valid, 0.9, 0.05)
    for row, size in zip(weights.numpy(), (7, 4, 1)):
        E = transition(new[:size].numpy()) if size > 1 else np.ones((1, 1))
        expected = 0.1 * np.linalg.inv(np.eye(size) - 0.9 * E).sum(axis=0) / size
        np.testing.assert_allclose(row[:size], expected, atol=1e-12)
        assert (row[size:] == 0).all() and row.sum() == pytest.approx(1)


def test_one_image_keeps_its_feature_two_share_alike():
    old, new, labels = draw([1, 2, 9, 1])
    assert apart(refine_prototypes(old, new, labels), class_means(old, labels))[[0, 1, 3]].max() < 1e-12


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_without_damping_the_prototypes_are_the_plain_means(dtype):
    old, new, labels = draw([1, 2, 9, 1, 700, 40], width=32, dtype=dtype)
    result = refine_prototypes(old, new, labels, damping=0.0)
    assert apart(result, class_means(old, labels)).max() < (1e-12 if dtype == np.float64 else 1e-6)


def test_the_order_of_rows_and_the_length_of_new_features_do_not_matter():
    old, new, labels = draw([5, 1, 8, 3, 12])
    result = refine_prototypes(old, new, labels)
    order = np.random.default_rng(5).permutation(len(labels))
    lengths = np.random.default_rng(6).uniform(0.1, 9, (len(labels), 1))
    reordered = refine_prototypes(old[order], (lengths * new)[order], labels[order])
    torch.testing.assert_close(reordered, result, rtol=0, atol=1e-12)
    # The length of an old feature does matter, even to the direction alone: features are taken as stored.
    longer, directions = (refine_prototypes(rows, new, labels, normalize=True) for rows in (lengths * old, old))
    assert not torch.allclose(longer, directions, atol=1e-2)


@pytest.mark.parametrize("form", ["memmap", "tensor", "float16", "mixed", "wider new features"])
def test_what_features_may_be(tmp_path, form):
    old, new, labels = draw([5, 1, 8, 3], dtype=np.float32)
    expected, dtype = slowly(old, new, labels), torch.float32
    tolerance = 2e-2 if form == "float16" else 1e-5
    if form == "memmap":
        for name, rows in (("old", old), ("new", new), ("labels", labels)):
            np.save(tmp_path / f"{name}.npy", rows)
        old, new, labels = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("old", "new", "labels"))
    elif form == "tensor":
        old, new, labels = torch.from_numpy(old).requires_grad_(), torch.from_numpy(new), torch.from_numpy(labels)
    elif form == "float16":
        old, new = old.astype(np.float16), new.astype(np.float16)
    elif form == "mixed":
        old, dtype = old.astype(np.float64), torch.float64
    else:
        new = np.concatenate([new, np.zeros_like(new)], axis=1)
    result = refine_prototypes(old, new, labels)
    assert result.dtype == dtype and result.device.type == "cpu" and not result.requires_grad
    assert apart(result, expected).max() < tolerance


def test_shares_of_the_classes_are_parts_of_the_whole():
    old, new, labels = draw([5, 1, 8, 3, 12])
    whole = refine_prototypes(old, new, labels)
    parts = [refine_prototypes(old, new, labels, classes=share) for share in ((0, 2), (2, 2), (2, 5))]
    assert [len(part) for part in parts] == [2, 0, 3]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)


def test_what_does_not_fit_is_named():
    old, new, labels = draw([5, 2, 3])
    for wrong, message in [
        ((old[:-1], new, labels), "9 old features, 10 new features and 10 labels"),
        ((old, new, np.where(labels == 1, 2, labels)), "class 1 has no image"),
        ((old, new, np.where(labels == 1, -1, labels)), "labels must be 0 or more"),
        ((old, new, labels, 1.0), "damping"),
        ((old, new, labels, 0.9, 0.0), "temperature"),
    ]:
        with pytest.raises(ValueError, match=message):
            refine_prototypes(*wrong)
    for which in (0, 1):
        inputs = [old.copy(), new.copy()]
        inputs[which][4, 2] = np.nan
        with pytest.raises(ValueError, match=f"row 4 of the {('old', 'new')[which]} features is not finite"):
            refine_prototypes(*inputs, labels)


@pytest.mark.gpu
def test_the_same_on_the_gpu():
    old, new, labels = draw([5, 1, 80, 3, 12, 300])
    on_gpu = refine_prototypes(torch.from_numpy(old).cuda(), torch.from_numpy(new), labels)
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), refine_prototypes(old, new, labels, device="cpu"), rtol=0, atol=1e-10)
