"""Thresholds that carry over: a planted change of scores is undone on people the map has not seen; rates by loops."""

import pathlib

import numpy as np
import pytest

from tools.ijbc_eval.bootstrap import FEWEST, Bootstrap, Units
from tools.ijbc_eval.files import EvalError
from tools.ijbc_eval.roc import Roc
from tools.ijbc_eval.thresholds import Deployed, Pool, ScoreMap, read_cohorts

PEOPLE, FPR = 120, 0.01


def all_pairs(people):
    """Each person against each other one, both ways, and ten genuine pairs each: first, second, label."""
    first, second = (side.ravel() for side in np.mgrid[:people, :people])
    own = np.repeat(np.arange(people), 9)
    first, second = np.concatenate([first, own]), np.concatenate([second, own])
    return first, second, first == second


def planted(rng, first, second, label, scale=1.0, shift=0.0):
    """Scores of a model: people who are alike to others than with another model, then a planted change of scale."""
    alike = rng.normal(0, 0.05, (2, PEOPLE))
    raw = 0.05 + 0.45 * label + alike[0, first] + alike[1, second] + rng.normal(0, 0.1, len(first))
    return (scale * raw + shift).astype(np.float32)


def make_pool(first, second, label, bootstrap=None):
    rows = {"fmr": np.flatnonzero(~label), "fnmr": np.flatnonzero(label)}
    return Pool(rows, Units.of_pairs(first, second), bootstrap)


@pytest.fixture(scope="module")
def case():
    rng, pairs = np.random.default_rng(0), all_pairs(PEOPLE)
    old, cross = planted(rng, *pairs), planted(rng, *pairs, scale=0.6, shift=-0.2)
    own = planted(rng, *pairs, scale=1.1, shift=0.25)
    threshold = float(Roc(old, pairs[2]).threshold_at(FPR))
    pool = make_pool(*pairs, Bootstrap(PEOPLE, 400, seed=4))
    return {"pairs": pairs, "old": old, "tests": (cross, own), "deployed": Deployed(pool, PEOPLE, old, threshold)}


def test_a_planted_shift_is_undone_for_people_the_map_has_not_seen(case):
    deployed = case["deployed"]
    assert deployed.read(case["old"])["fmr"] == pytest.approx(FPR, abs=1e-4)
    on_held_out = deployed.read(case["old"], "held out")["fmr"]
    for scores in case["tests"]:
        raw, mapped = deployed.read(scores), deployed.read_mapped(scores, deployed.fit(scores))
        low, high = mapped["interval"]["fmr"]
        assert low <= FPR <= high and low <= on_held_out <= high
        assert not FPR / 5 < raw["fmr"] < 5 * FPR  # the shift was no small one
        assert mapped["pairs"] == "held out" and high < 3 * FPR
        moved = deployed.pools["held out"].rates(scores, mapped["threshold"])  # the threshold moved, not the scores
        assert moved["errors"] == pytest.approx(mapped["errors"], abs=2)


def test_halves_share_nobody(case):
    first, second, label = case["pairs"]
    deployed = case["deployed"]
    held_out = deployed.pools["held out"].rows
    judged = set(first[held_out["fnmr"]].tolist())
    fitted = set(first[deployed.fitted].tolist())
    assert fitted.isdisjoint(judged) and len(fitted) == len(judged) == PEOPLE // 2
    for rows, people in ((deployed.fitted, fitted), (held_out["fmr"], judged)):
        assert {*first[rows].tolist(), *second[rows].tolist()} == people and not label[rows].any()
        assert len(rows) == PEOPLE // 2 * (PEOPLE // 2 - 1)  # none left out but the pairs across


def test_a_map_keeps_the_order_of_all_scores():
    rng = np.random.default_rng(2)
    reference, impostor = rng.normal(0.1, 0.1, 500), rng.normal(-0.2, 0.05, 500)
    found = ScoreMap.fit(impostor.astype(np.float32), reference.astype(np.float32))
    scores = np.linspace(-1, 1, 4001).astype(np.float32)
    mapped = found(scores)
    assert (np.diff(mapped) > 0).all() and mapped.dtype == np.float32
    assert found.fmr.min() == FEWEST / 500 and found.fmr.max() == 1 - FEWEST / 500
    for fmr, score, to in zip(found.fmr, found.score, found.mapped):
        assert np.mean(impostor.astype(np.float32) > score) == pytest.approx(fmr)
        assert np.mean(reference.astype(np.float32) > to) == pytest.approx(fmr)
        assert found(np.array([score])) == pytest.approx(to, abs=1e-6)
        assert found.threshold(to) == pytest.approx(score)
    assert [found.threshold(to) for to in mapped[::100].tolist()] == pytest.approx(scores[::100].tolist(), abs=1e-4)


def test_a_map_of_tied_scores():
    impostor = np.repeat(np.arange(5, dtype=np.float32) / 10, 20)
    found = ScoreMap.fit(impostor, 2 * impostor)
    assert found(impostor).tolist() == pytest.approx((2 * impostor).tolist())
    constant = ScoreMap.fit(np.full(50, 0.5, np.float32), np.linspace(0, 1, 50).astype(np.float32))
    assert np.diff(constant(np.array([0.4, 0.5, 0.6]))).tolist() == pytest.approx([0.1, 0.1])


def test_nothing_is_claimed_beyond_ten_impostors(case):
    pairs, old = case["pairs"], case["old"]
    fitted = np.sort(old[case["deployed"].fitted])
    scores = case["tests"][0]
    for above, claimed in ((FEWEST, True), (FEWEST - 1, False), (0, False), (len(fitted) - FEWEST + 1, False)):
        threshold = float(fitted[-1 - above])
        deployed = Deployed(make_pool(*pairs), PEOPLE, old, threshold)
        assert deployed.claimed == claimed
        assert (deployed.read_mapped(scores, deployed.fit(scores)) is not None) == claimed
    assert ScoreMap.fit(old[:39], old[:39]) is None


def test_rates_equal_loops_over_pairs():
    rng = np.random.default_rng(7)
    first, second = rng.integers(0, 6, (2, 400))
    label = first == second
    scores = np.round(rng.normal(0.5 * label, 0.4), 1).astype(np.float32)
    group = np.array([0, 1, 0, 1, 1, -1])
    bootstrap = Bootstrap(6, 30, seed=2)
    pool = make_pool(first, second, label, bootstrap)
    for number, part in ((None, pool), (0, pool.within(group, 0)), (1, pool.within(group, 1))):
        inside = [number is None or group[a] == group[b] == number for a, b in zip(first, second)]
        found = part.rates(scores, np.float32(0.3))
        rows = list(zip(scores, label, inside, first, second))
        impostors = [(s > np.float32(0.3), a, b) for s, same, here, a, b in rows if here and not same]
        genuines = [(s <= np.float32(0.3), a, None) for s, same, here, a, b in rows if here and same]
        for key, cases in (("fmr", impostors), ("fnmr", genuines)):
            assert found["errors"][key] == sum(wrong for wrong, *_ in cases)
            assert found[key] == pytest.approx(np.mean([wrong for wrong, *_ in cases]))
            if found["errors"][key] < FEWEST:
                assert found["interval"][key] is None
                continue
            resampled = []
            for w in bootstrap.weights.tolist():
                weights = [w[a] * (1 if b is None else w[b]) for _, a, b in cases]
                if any(weights):
                    resampled.append(sum(v for v, (wrong, *_) in zip(weights, cases) if wrong) / sum(weights))
            assert found["interval"][key] == pytest.approx(np.quantile(resampled, [0.025, 0.975]))
    assert pool.rates(scores, 9.0)["interval"]["fmr"] is None  # no error at all
    nobody = pool.within(group, 7).rates(scores, 0.3)
    assert nobody["fmr"] is None and nobody["fnmr"] is None


def test_curves_pass_through_the_rates():
    rng = np.random.default_rng(3)
    pairs = all_pairs(PEOPLE)
    pool, grid = make_pool(*pairs), np.linspace(-1, 1, 65)
    for scores in (planted(rng, *pairs), np.round(8 * planted(rng, *pairs)) / 8):  # ties at the thresholds
        found = pool.curves(scores, grid)
        for place in (32, 36, 40, 48):
            at = pool.rates(scores, grid[place])
            assert (found["fmr"][place], found["fnmr"][place]) == pytest.approx((at["fmr"], at["fnmr"]), abs=1e-6)


def test_cohorts(tmp_path):
    path = tmp_path / "groups.csv"
    path.write_text("SUBJECT_ID,GROUP\n3,women\n5, men over 50\n\n99,men\n8 women\n")
    names, group = read_cohorts(path, np.array([3, 4, 5, 8]))
    assert [names[number] if number >= 0 else None for number in group] == ["women", None, "men over 50", "women"]


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("", "is empty; --cohorts takes a line `subject group` for each person"),
        ("3 a\n5\n", "line 2: expected `subject group`, found '5'"),
        ("3 a\nx b\n", "line 2: expected `subject group`"),
        ("3 a\n5 b\n3 b\n", "line 3: subject 3 is in 'b' here and in 'a' above"),
        ("4000 a\n", "none of its 1 subjects is evaluated"),
        (None, r"cannot be read \(No such file or directory\); "),
    ],
)
def test_wrong_cohorts(tmp_path, text, pattern):
    path = pathlib.Path(tmp_path / "groups.txt")
    if text is not None:
        path.write_text(text)
    with pytest.raises(EvalError, match=rf"groups\.txt.*{pattern}"):
        read_cohorts(path, np.array([3, 4, 5]))


def test_cohorts_of_folders_are_parted_by_a_tab(tmp_path):
    path = tmp_path / "groups.txt"
    path.write_text("Person 01 A\n")
    with pytest.raises(EvalError, match="line 1: expected `folder<TAB>group`, found 'Person 01 A'"):
        read_cohorts(path, np.array(["Person 01"]), "\t")
