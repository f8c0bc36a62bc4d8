import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.ijbc_eval.metrics import FPIRS, TOP, Search, identification_summary, mean_top, pooled_top, search
from tools.ijbc_eval.templates import l2_normalise


def random_features(rng, count, width=4):
    return l2_normalise(rng.normal(size=(count, width)).astype(np.float32))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), subjects=st.integers(1, 8), probes=st.integers(4, 30), chunk=st.integers(1, 40))
def test_equals_sorting_every_row(plain_class, seed, subjects, probes, chunk):
    rng = np.random.default_rng(seed)
    subject = rng.permutation(20)[:subjects] * 7
    asked = np.concatenate([subject[:1], [1], rng.integers(0, 20, probes - 2) * 7])  # one mated, one not, at least
    gallery, probe = random_features(rng, subjects), random_features(rng, probes)
    found = search(gallery, subject, probe, asked, chunk)
    tops, tpirs = plain_class.search(
        list(enumerate(subject.tolist())),
        list(enumerate(asked.tolist())),
        gallery.astype(np.float64),
        probe.astype(np.float64),
        TOP,
        FPIRS,
    )
    assert [found.top(k) for k in TOP] == pytest.approx(tops)
    assert [found.tpir_at(fpir) for fpir in FPIRS] == pytest.approx(tpirs)


def test_a_tie_with_another_subject_is_not_found():
    gallery = np.eye(3, dtype=np.float32)[[0, 0, 1]]
    found = search(gallery, np.array([4, 5, 6]), np.eye(3, dtype=np.float32)[[0, 1, 2]], np.array([4, 6, 99]))
    assert found.rank.tolist() == [2, 1, 0]
    assert found.mated.tolist() == [True, True, False]
    assert found.top(1) == 0.5 and found.top(5) == 1.0
    assert found.score.tolist() == [-np.inf, 1.0, 0.0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_features_that_are_not_finite_are_refused(value, side):
    """A NaN is not below any score: a probe of NaN would rank first."""
    features = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)
    features[side][2, 0] = value
    with pytest.raises(ValueError, match="not finite"):
        search(features[0], np.arange(3), features[1], np.arange(3))


def test_a_score_equal_to_the_threshold_is_not_above_it():
    score = np.array([0.5, 0.7, 0.5, 0.3], np.float32)
    found = Search(np.array([True, True, False, False]), np.array([1, 1, 0, 0]), score)
    assert found.tpir_at(0.49) == 0.5  # no false alarm allowed: the threshold is 0.5, and 0.5 is not above it
    assert found.tpir_at(0.5) == 1.0
    assert found.tpir_at(1.0) == found.top(1) == 1.0


def test_the_best_of_a_subjects_templates_counts():
    rng = np.random.default_rng(6)
    gallery, probe = random_features(rng, 6), random_features(rng, 40)
    subject, asked = np.array([3, 8, 3, 8, 3, 9]), rng.choice([3, 8, 9, 50], 40)
    found = search(gallery, subject, probe, asked)
    scores = probe @ gallery.T
    for row, one in enumerate(asked):
        best = {s: scores[row, subject == s].max() for s in (3, 8, 9)}
        if one == 50:
            assert found.score[row] == max(best.values())
        else:
            assert found.rank[row] == sorted(best, key=best.get, reverse=True).index(one) + 1


def test_the_last_row_is_the_mean_of_the_galleries():
    rng = np.random.default_rng(8)
    asked = rng.integers(0, 18, (2, 60))
    runs = [search(random_features(rng, 9), np.arange(9), random_features(rng, 60), one) for one in asked]
    tops, tpirs = identification_summary(runs)
    assert tops.shape == (3, 3) and tpirs.shape == (3, 5)
    np.testing.assert_allclose(tops[2], (tops[0] + tops[1]) / 2)
    np.testing.assert_allclose(tpirs[2], (tpirs[0] + tpirs[1]) / 2)
    assert tops[0, 0] != tops[1, 0]


def test_without_non_mated_probes_tpir_is_not_defined():
    found = search(np.eye(2, dtype=np.float32), np.array([0, 1]), np.eye(2, dtype=np.float32), np.array([0, 1]))
    assert np.isnan(found.tpir_at(0.1)) and found.top(1) == 1.0


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), first=st.integers(1, 12), second=st.integers(1, 12), probes=st.integers(4, 40))
def test_published_reads_like_the_scripts_in_circulation(plain_class, seed, first, second, probes):
    rng = np.random.default_rng(seed)
    subject = np.arange(first + second)
    asked = np.concatenate([[0, first], rng.integers(0, first + second + 3, probes - 2)])  # some are in no gallery
    gallery, probe = random_features(rng, len(subject)), random_features(rng, probes)
    halves = slice(0, first), slice(first, None)
    found = [search(gallery[half], subject[half], probe, asked) for half in halves]
    mixed = search(gallery, subject, probe, asked).rank
    tops, tpirs = identification_summary(found, mixed, "published")
    listed = [list(zip(subject[half].tolist(), subject[half].tolist())) for half in halves]
    expected = plain_class.published(
        listed, list(enumerate(asked.tolist())), gallery.astype(np.float64), probe.astype(np.float64), TOP, FPIRS
    )
    np.testing.assert_allclose(tops, [top for top, _ in expected])
    np.testing.assert_allclose(tpirs, [tpir for _, tpir in expected])


def test_the_published_threshold_lets_one_fewer_through():
    score = np.array([0.8, 0.6, 0.4, 0.2, 0.9, 0.7, 0.5, 0.3], np.float32)
    found = Search(np.arange(8) < 4, np.array([1, 1, 1, 1, 0, 0, 0, 0]), score)
    exact, published = ([found.tpir_at(fpir, how) for fpir in (0.2, 0.25, 0.5, 1.0)] for how in ("exact", "published"))
    assert exact == [0.0, 0.25, 0.5, 1.0]
    assert published == [0.0, 0.0, 0.25, 0.75]
    assert found.threshold_at(0.5, "published") == np.float32(0.7)


def test_the_published_place_is_that_of_a_float_product():
    """0.29 · 100 is 28.999999999999996: the scripts take place 27, not 28."""
    found = Search(np.arange(101) > 99, np.array([0] * 100 + [1]), np.arange(101, dtype=np.float32))
    assert found.threshold_at(0.29, "published") == 99 - 27
    assert found.threshold_at(0.29) == 99 - 29


def test_published_top_k_weighs_every_probe_alike():
    mated = np.array([[True, False, False, False, False], [False, True, True, True, False]])
    ranks = np.array([[1, 0, 0, 0, 0], [0, 2, 1, 3, 0]])
    runs = [Search(*one, np.zeros(5, np.float32)) for one in zip(mated, ranks)]
    assert mean_top(runs, 1) == pytest.approx((1 + 1 / 3) / 2)
    assert mean_top(runs, 1, "published") == 2 / 5
    assert pooled_top([2, 2, 1, 4, 0], 1) == 1 / 5 and pooled_top([2, 2, 1, 4, 0], 5) == 4 / 5
    tops, tpirs = identification_summary(runs, np.array([2, 2, 1, 4, 0]), "published")
    assert tops.shape == (4, 3) and tpirs.shape == (4, 5)
    assert tops[2:, 0].tolist() == [2 / 5, 1 / 5] and np.isnan(tpirs[3]).all()
