"""The bootstrap over subjects against drawing people and writing their pairs and queries out, one by one."""

import numpy as np
import pytest

from tools.ijbc_eval import bootstrap
from tools.ijbc_eval.bootstrap import Bootstrap, Units, interval, verdict
from tools.ijbc_eval.metrics import Search, mean_tpir
from tools.ijbc_eval.roc import Roc

SUBJECTS = 7


def drawn_pairs(rng, pairs=160):
    """Scores full of ties, labels and the two subjects of random pairs."""
    first, second = rng.integers(0, SUBJECTS, (2, pairs))
    label = first == second
    return np.round(rng.normal(0.4 * label, 0.3), 1).astype(np.float32), label, first, second


def written_out(values, counts):
    return np.repeat(values, counts)


@pytest.mark.parametrize("spare", [1024, 0])  # 0: the top of the list is too short for most resamples at first
@pytest.mark.parametrize("fpr", [0.003, 0.05, 0.5, 1.0])
def test_tpr_equals_plain_resampling(monkeypatch, fpr, spare):
    monkeypatch.setattr(bootstrap, "_SPARE", spare)
    scores, label, first, second = drawn_pairs(np.random.default_rng(5))
    units, draws = Units.of_pairs(first, second), Bootstrap(SUBJECTS, 50, seed=3)
    impostors = units[~label]
    found = draws.tpr_at(fpr, scores[label], units[label], scores[~label], impostors, draws.total(impostors))
    assert draws.weights[:, :-1].sum(axis=1).tolist() == [SUBJECTS] * 50
    for value, weight in zip(found, draws.weights):
        counts = np.where(label, weight[first], weight[first] * weight[second])
        assert value == Roc(written_out(scores, counts), written_out(label, counts)).tpr_at(fpr)
    assert len(set(found)) > 5 if fpr < 1 else set(found) == {1.0}


def test_tpir_equals_plain_resampling():
    rng = np.random.default_rng(8)
    subject = rng.integers(0, SUBJECTS, 60)
    searches = []
    for enrolled in ((0, 1, 2), (3, 4)):
        mated = np.isin(subject, enrolled)
        rank = np.where(mated, rng.integers(1, 3, 60), 0)
        score = np.round(rng.normal(0.3 * mated, 0.3), 1).astype(np.float32)
        searches.append(Search(mated, rank, np.where(rank == 2, -np.inf, score)))
    draws = Bootstrap(SUBJECTS, 40, seed=1)
    found = draws.tpir_at(0.1, searches, Units.of_queries(subject))
    for value, weight in zip(found, draws.weights):
        repeated = [
            Search(*(written_out(part, weight[subject]) for part in (one.mated, one.rank, one.score)))
            for one in searches
        ]
        expected = mean_tpir(repeated, 0.1)
        assert value == pytest.approx(expected, nan_ok=True, abs=1e-12)
    assert np.isfinite(found).sum() > 30


def test_total_and_share_count_every_unit():
    _, _, first, second = drawn_pairs(np.random.default_rng(6), 40)
    units, draws = Units.of_pairs(first, second), Bootstrap(SUBJECTS, 9, seed=2)
    weights = [[w[a] if a == b else w[a] * w[b] for a, b in zip(first, second)] for w in draws.weights.tolist()]
    total = draws.total(units)
    assert total.tolist() == [sum(row) for row in weights]
    some = units[:11]
    assert draws.share(some, total).tolist() == pytest.approx([sum(row[:11]) / sum(row) for row in weights])
    one = Units.of_queries(first[:1])
    drawn = draws.weights[:, first[0]] > 0
    assert np.isnan(draws.share(one, draws.total(one))).tolist() == (~drawn).tolist() and not drawn.all()


def test_resamples_of_a_seed_are_the_same_for_every_model():
    one, again, other = (Bootstrap(SUBJECTS, 5, seed).weights.tolist() for seed in (0, 0, 1))
    assert one == again != other


def test_an_interval_covers_the_truth_nearly_always():
    """1:1 TPR of 200 sets of 40 people, whose true TPR is known. Pairs drawn one by one would cover it in 138."""
    rng, covered = np.random.default_rng(11), 0
    first = np.repeat(np.arange(40), 10)
    impostor_first, impostor_second = (side.ravel() for side in np.triu_indices(40, 1))
    units = Units.of_pairs(first, first), Units.of_pairs(impostor_first, impostor_second)
    for seed in range(200):
        people = rng.normal(0, 0.8, 40)  # pairs of one person are alike
        genuine = (2 + people[first] + rng.normal(0, 0.3, len(first))).astype(np.float32)
        impostor = rng.normal(0, 1, len(impostor_first)).astype(np.float32)
        draws = Bootstrap(40, 100, seed)
        low, high = interval(draws.tpr_at(0.1, genuine, units[0], impostor, units[1], draws.total(units[1])))
        covered += low <= 0.7998 <= high  # P(N(2, 0.8² + 0.3²) > the normal's 0.9 quantile, 1.28155)
    assert 180 <= covered <= 198


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        (np.linspace(0.001, 1, 1000), "yes"),
        (np.linspace(-1, -0.001, 1000), "no"),
        (np.zeros(1000), "no"),  # the same figures: not above
        (np.linspace(-0.1, 1, 1000), "undecided"),
        (np.linspace(-0.02, 1, 1000), "yes"),  # 2 % of the resamples, in the tail that the interval leaves out
        (np.full(1000, np.nan), "undecided"),
    ],
)
def test_verdict(differences, expected):
    assert verdict(differences, people=20, errors=1) == expected
    assert verdict(differences, people=19, errors=1) == verdict(differences, people=20, errors=0) == "undecided"


def test_interval_leaves_undefined_resamples_out():
    assert interval(np.append(np.arange(101.0), np.nan)) == pytest.approx([2.5, 97.5])
    assert interval(np.array([np.nan])) is None
