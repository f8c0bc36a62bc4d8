import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from tools.ijbc_eval import metrics, roc
from tools.ijbc_eval.metrics import pair_scores
from tools.ijbc_eval.roc import Roc, most_allowed
from tools.ijbc_eval.templates import l2_normalise

# Few different scores, so that ties are everywhere.
tied = st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=2, max_size=60).filter(
    lambda rows: 0 < sum(label for _, label in rows) < len(rows)
)
rates = st.sampled_from([0.0, 1e-6, 0.01, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.9, 1.0])


def unpack(rows):
    return np.array([score for score, _ in rows], np.float32), np.array([label for _, label in rows])


@settings(deadline=None)
@given(rows=tied, fpr=rates)
def test_tpr_is_the_largest_whose_fpr_does_not_exceed(plain_class, rows, fpr):
    scores, label = unpack(rows)
    assert Roc(scores, label).tpr_at(fpr) == pytest.approx(plain_class.tpr_at(scores, label, fpr), abs=1e-12)


@settings(deadline=None)
@given(rows=tied)
def test_auc_equals_sklearn(rows):
    scores, label = unpack(rows)
    assert Roc(scores, label).auc == pytest.approx(roc_auc_score(label, scores), abs=1e-12)


@settings(deadline=None)
@given(rows=tied, fpr=rates)
def test_published_reads_like_the_scripts_in_circulation(rows, fpr):
    scores, label = unpack(rows)
    fprs, tprs, _ = roc_curve(label, scores)
    fprs, tprs = np.flipud(fprs), np.flipud(tprs)
    _, place = min(zip(np.abs(fprs - fpr), range(len(fprs))))
    assert Roc(scores, label).tpr_at(fpr, "published") == pytest.approx(tprs[place], abs=1e-12)


anything = st.floats(-1, 1, width=32) | st.sampled_from([-1e38, 0.0, -0.0, 1e-45, 2e-45, 1e38])


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(anything, st.booleans()), min_size=2, max_size=60),
    fprs=st.lists(rates, max_size=3),
    other=rates,
    cells=st.sampled_from([2, 5, 1 << 16]),
)
def test_counting_equals_sorting_whatever_the_scores(rows, fprs, other, cells):
    """AUC and thresholds, those announced and another one, from counts in few cells, a few scores at a time."""
    scores, label = unpack(rows)
    if label.all() or not label.any():
        return
    impostor = np.sort(scores[~label])
    auc = np.mean([(g > impostor).mean() + (g == impostor).mean() / 2 for g in scores[label]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roc, "CELLS", cells)
        patch.setattr(roc, "PART", 7)
        found = Roc(scores, label, fprs)
        assert found.auc == pytest.approx(auc, abs=1e-12)
        for fpr in (*fprs, other):
            allowed = most_allowed(fpr, len(impostor))
            threshold = impostor[-1 - allowed] if allowed < len(impostor) else -np.inf
            assert found.threshold_at(fpr) == threshold
            assert found.tpr_at(fpr) == np.mean(scores[label] > threshold)


def test_published_may_exceed_the_fpr_asked_for():
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], np.float32)
    label = np.array([1, 0, 1, 0, 0, 0], bool)
    exact, _ = metrics.verification_summary(scores, label, (0.2,))
    published, _ = metrics.verification_summary(scores, label, (0.2,), "published")
    assert exact[0] == 0.5  # one of four impostors is already 0.25
    assert published[0] == 1.0  # the point at 0.25 is nearer than the one at 0


def test_large_score_matrices_are_not_looked_up_in_32_bits():
    """Row 50,000 of 50,000 columns begins beyond 2^31; the block stands for the two scores there."""
    row, columns = np.full(2, 50_000, np.int32), np.array([1, 0], np.int32)
    scores = np.zeros(2, np.float32)
    metrics._look_up(np.array([7, 8], np.float32), 50_000 * 50_000, 50_000, row, columns, scores)
    assert scores.tolist() == [8, 7]


@given(total=st.integers(1, 400), count=st.integers(0, 400))
def test_most_allowed_is_exact_at_every_step(total, count):
    count = min(count, total)
    assert most_allowed(count / total, total) == count
    if count:
        assert most_allowed(np.nextafter(count / total, 0), total) == count - 1


@pytest.mark.parametrize("label", [[True, True], [False, False]])
def test_one_class_alone_is_an_error(label):
    with pytest.raises(ValueError, match="genuine"):
        Roc(np.array([0.1, 0.2], np.float32), label)


def test_a_non_finite_score_is_an_error():
    for value in (np.nan, np.inf):
        for place in (0, 1):
            scores = np.array([0.1, 0.2, 0.3], np.float32)
            scores[place] = value
            with pytest.raises(ValueError, match="not finite"):
                Roc(scores, [True, False, False])


# Dense: a matrix whole and in blocks; gathered: few pairs of many templates.
@pytest.mark.parametrize(("block", "dense_cost"), [(1 << 28, 32), (40, 32), (1 << 28, 0)])
@pytest.mark.parametrize("pairs", [1, 700])
def test_pair_scores_equal_single_products(monkeypatch, block, dense_cost, pairs):
    monkeypatch.setattr(metrics, "_BLOCK", block)
    monkeypatch.setattr(metrics, "_DENSE_COST", dense_cost)
    rng = np.random.default_rng(3)
    old, new = (l2_normalise(rng.normal(size=(30, 8)).astype(np.float32)) for _ in range(2))
    first, second = rng.integers(0, 12, pairs).astype(np.int32), rng.integers(5, 30, pairs).astype(np.int32)
    found = pair_scores(old, new, first, second)
    assert found.dtype == np.float32
    expected = [float(old[a].astype(float) @ new[b].astype(float)) for a, b in zip(first, second)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_pairs_over_many_parts(monkeypatch):
    rng = np.random.default_rng(4)
    features = l2_normalise(rng.normal(size=(50, 4)).astype(np.float32))
    first, second = rng.integers(0, 50, (2, 200_001)).astype(np.int32)  # more than a thread's part, and not a multiple
    expected = np.einsum("pd,pd->p", features[first], features[second])
    np.testing.assert_allclose(pair_scores(features, features, first, second), expected, atol=1e-6)


def test_folds_see_squared_distances(monkeypatch):
    seen = []
    monkeypatch.setattr(metrics, "accuracy_over_folds", lambda distance, same, folds: seen.append(distance))
    metrics.fold_accuracy(np.tile([1.0, 0.5], 10), np.tile([True, False], 10))
    np.testing.assert_allclose(seen[0], [0, 1] * 10)  # |a − b|² of unit vectors: 60 degrees are 1 apart


def test_folds_of_a_list_sorted_by_label_have_pairs_of_both_kinds(monkeypatch):
    scores, label = np.repeat([0.9, 0.3], [70, 130]), np.repeat([True, False], [70, 130])
    assert metrics.fold_accuracy(scores, label) == 1  # contiguous tenths would be judged by thresholds of one kind
    seen = []
    monkeypatch.setattr(metrics, "accuracy_over_folds", lambda distance, same, folds: seen.append(same))
    metrics.fold_accuracy(scores, label)
    assert [tenth.sum() for tenth in np.array_split(seen[0], 10)] == [7] * 10
