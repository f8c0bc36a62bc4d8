"""Orders, the three ways to search a half re-embedded gallery, and flips: ten queries, worked out one by one."""

import math
import types

import numpy as np
import pytest

from tools.ijbc_eval import flips, refresh
from tools.ijbc_eval.bootstrap import Bootstrap
from tools.ijbc_eval.evaluation_set import Subjects
from tools.ijbc_eval.files import EvalError

# Gallery templates 10 … 13 (rows 0 … 3) of the people 100 … 103; people 104 and 105 are not enrolled. Query templates
# 20 … 29 (rows 4 … 13). An angle is a feature; the new model's scores are half as far apart as the old one's.
ENROLLED = [100, 101, 102, 103]
QUERIES = [100, 101, 102, 103, 100, 101, 102, 103, 104, 105]
OLD = [0, 40, 80, 120] + [2, 61, 62, 104, -28, 41, 97, 95, 45, 76]
NEW = [0, 20, 40, 60] + [0, 24, 48, 69, -9, 25, 44, 68, 24, 19]
CROSS = [22, 65, 107, 103, -16, 13, 77, 133, 66, 97]  # of the new model's queries when they search old templates


def as_features(angles):
    radians = np.deg2rad(np.array(angles, float))
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


OLD_FEATURES, NEW_FEATURES = as_features(OLD), as_features(NEW)
QUERY_FEATURES = as_features([0, 0, 0, 0, *CROSS])
ORDER = [2, 0, 3, 1]  # rows in which the gallery is re-embedded


def cosine(a, b):
    return math.cos(math.radians(a - b))


def doubled(scores):
    """The score map of new/new: an angle counts twice."""
    return np.cos(2 * np.arccos(np.clip(scores, -1, 1))).astype(np.float32)


def halved(scores):
    return np.cos(0.5 * np.arccos(np.clip(scores, -1, 1))).astype(np.float32)


@pytest.fixture
def evaluation():
    faces = types.SimpleNamespace(
        template_ids=np.array([10, 11, 12, 13, *range(20, 30)]),
        template=np.array([0, 0, 1, 1, 2, 3, *range(4, 14)]),
        image=np.array([5, 0, 1, 2, 3, 4, *range(6, 16)]),
        names=np.array([f"{number}.jpg" for number in range(16)], "S64"),
    )
    gallery = Subjects(np.arange(4), np.array(ENROLLED))
    people = np.array([0, 1, 2, 3, *(subject - 100 for subject in QUERIES)])
    return types.SimpleNamespace(
        faces=faces,
        galleries={"G1": gallery},
        probes=Subjects(np.arange(4, 14), np.array(QUERIES)),
        subjects=(np.arange(100, 106), people),
        set=types.SimpleNamespace(separator=None, template_names=lambda faces: faces.template_ids),
        person_of=lambda template: 100 + people[template],
    )


def by_hand(way, done):
    """Per query (own entry's rank, score as in metrics.Search), comparing angles one by one."""
    found = []
    for number, person in enumerate(QUERIES):
        scores = {}
        for row, enrolled in enumerate(ENROLLED):
            new = cosine(NEW[4 + number], NEW[row])
            if way == "plain":
                score = new if row in done else cosine(CROSS[number], OLD[row])
            elif way == "calibrated":
                cross = math.cos(math.radians(abs(CROSS[number] - OLD[row]) / 2))
                score = math.cos(2 * math.acos(min(new, 1))) if row in done else cross
            else:
                score = math.cos(2 * math.acos(min(new, 1))) if row in done else cosine(OLD[4 + number], OLD[row])
            scores[enrolled] = score
        best = max(scores.values())
        if person not in scores:
            found.append((0, best))
        else:
            rank = 1 + sum(score >= scores[person] for other, score in scores.items() if other != person)
            found.append((rank, best if rank == 1 else -math.inf))
    return found


def test_ten_queries_while_four_templates_are_re_embedded(evaluation):
    orders = {"one": np.array(ORDER), "other": np.array(ORDER[::-1])}
    found = refresh.searches(evaluation, OLD_FEATURES, QUERY_FEATURES, NEW_FEATURES, halved, doubled, orders)
    assert list(found) == [(order, way) for order in orders for way in ("plain", "calibrated", "merged")]
    ranks = {}
    for (order, way), steps in found.items():
        assert len(steps) == 11
        for percent, [search] in zip(range(0, 101, 10), steps):
            done = set(orders[order][: round(4 * percent / 100)].tolist())
            expected = by_hand(way, done)
            assert search.rank.tolist() == [rank for rank, _ in expected]
            assert search.score.tolist() == pytest.approx([score for _, score in expected], abs=1e-5)
            assert search.mated.tolist() == [True] * 8 + [False] * 2
        ranks[order, way] = [search.rank.tolist() for [search] in steps]
    assert len({str(one) for one in ranks.values()}) == 6  # no two ways and orders are alike here


def test_what_cannot_be_searched_is_left_out(evaluation):
    orders = {"one": np.array(ORDER)}
    features = OLD_FEATURES, QUERY_FEATURES, NEW_FEATURES
    found = refresh.searches(evaluation, *features, None, doubled, orders)
    assert list(found) == [("one", "plain"), ("one", "merged")]
    assert list(refresh.searches(evaluation, *features, None, None, orders)) == [("one", "plain")]


def test_many_queries_are_searched_in_parts(evaluation, monkeypatch):
    arguments = OLD_FEATURES, QUERY_FEATURES, NEW_FEATURES, halved, doubled, {"one": np.array(ORDER)}
    whole = refresh.searches(evaluation, *arguments)
    monkeypatch.setattr(refresh, "_CHUNK", 3)
    for key, steps in refresh.searches(evaluation, *arguments).items():
        for [one], [other] in zip(steps, whole[key]):
            assert one.rank.tolist() == other.rank.tolist()
            assert one.score.tolist() == pytest.approx(other.score.tolist(), abs=1e-6)


def test_area():
    assert refresh.area([0.0] * 10 + [1.0]) == pytest.approx(0.05)
    assert refresh.area([0.3] * 11) == pytest.approx(0.3)
    assert refresh.area(np.arange(11) / 10) == pytest.approx(0.5)
    assert refresh.area([0.3] * 10 + [math.nan]) is None


class Store:
    """Two images a template for the first two; the mirrored images' embeddings are the same."""

    def get(self, model):
        embs = np.array([[0, 3], [1, 1], [2, 2], [1, 0], [0, 1], [5, 0], *[[1, 0]] * 10], np.float32)
        return types.SimpleNamespace(embs=embs, embs_f=embs, bad=np.zeros(16, bool))


def test_orders(evaluation, tmp_path):
    evaluation.store = Store()
    given, counts = tmp_path / "mine.txt", tmp_path / "queries.txt"
    given.write_text("12\n10\n13\n11\n")
    counts.write_text("10 3\n11 250\n12 0\n13 250\n\n")
    asked = ["random", "dispersion", str(given), f"most queried={counts}"]
    found = refresh.read_orders(evaluation, asked, 5, "model")
    drawn = np.random.default_rng(5).permutation(4).tolist()
    assert found["random"].tolist() == drawn
    assert found["mine"].tolist() == [2, 0, 3, 1]
    equal = [row for row in drawn if row in (1, 3)]
    assert found["most queried"].tolist() == [*equal, 0, 2]
    assert found["dispersion"].tolist() == [0, *(row for row in drawn if row != 0)]
    assert list(refresh.read_orders(evaluation, ["random"], 5, None)) == ["random"]


def test_dispersion_is_about_the_persons_mean(evaluation):
    evaluation.store = Store()
    found = refresh.dispersion(evaluation, "model", np.arange(4))
    # Template 10 has images at 0 and 90 degrees: 45 from their mean, whatever their lengths.
    assert found.tolist() == pytest.approx([1 - math.sqrt(0.5), 0, 0, 0], abs=1e-6)
    evaluation.subjects[1][3] = 2  # template 13, at 90 degrees, is of the person of 12, at 0
    found = refresh.dispersion(evaluation, "model", np.arange(4))
    assert found[2:].tolist() == pytest.approx([1 - math.sqrt(0.5)] * 2, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("10 1\n11\n", "line 2: expected `template number`, found '11'"),
        ("10\n11 4\n", "line 2: expected `template`, found '11 4'"),
        ("10 a\n", "line 1: expected `template number`"),
        ("10 nan\n", "line 1: expected `template number`"),
        ("10 1 2\n", "line 1: expected `template number`"),
        ("10 1\n10 2\n", "line 2: '10' is listed twice"),
        ("20 1\n", "line 1: '20' is not a gallery template"),
        ("10 1\n11 2\n", r"lists 2 of 4 gallery templates; add 1[23]"),
        (None, "cannot be read"),
    ],
)
def test_wrong_order_files(evaluation, tmp_path, text, pattern):
    path = tmp_path / "order.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(EvalError, match=rf"order\.txt.*{pattern}"):
        refresh.read_orders(evaluation, ["dispersion", str(path)], 0, "never embedded")


def test_two_orders_of_one_name(evaluation):
    with pytest.raises(EvalError, match="two orders are named 'random'"):
        refresh.read_orders(evaluation, ["random", "random"], 0, None)


def test_flips_of_ten_queries(evaluation):
    """Queries 0 … 7 are mated. Old right: 0 1 2 3 4 7. New right: 0 1 3 5 7. Lost: 2 and 4; found: 5."""
    old, new = np.zeros((1, 10), bool), np.zeros((1, 10), bool)
    old[0, [0, 1, 2, 3, 4, 7, 8]], new[0, [0, 1, 3, 5, 7]] = True, True
    mated = np.arange(10)[None] < 8
    found, flipped = flips.negative_flips(old, new, mated)
    assert np.flatnonzero(flipped[0]).tolist() == [2, 4]
    assert (found["queries"], found["flips"], found["rate"], found["interval"]) == (8, 2, 2 / 8, None)
    assert found["relative"] == pytest.approx((2 / 8) / ((6 / 8) * (3 / 8)))  # (1 − err_old) · err_new
    assert flips.rows(evaluation, "N", "cross-test", "rank 1", flipped) == [
        ["N", "cross-test", "rank 1", "G1", 22, 102, "8.jpg"],
        ["N", "cross-test", "rank 1", "G1", 24, 100, "10.jpg"],
    ]
    perfect, _ = flips.negative_flips(old, mated, mated)
    assert (perfect["flips"], perfect["relative"]) == (0, None)


def test_right_answers_at_rank_1_and_at_an_fpir(evaluation):
    orders = {"one": np.array(ORDER)}
    [steps] = refresh.searches(evaluation, OLD_FEATURES, QUERY_FEATURES, NEW_FEATURES, None, None, orders).values()
    [search] = steps[0]
    found = flips.answered([search], 0.5, "exact")
    ranks, scores = zip(*by_hand("plain", set()))
    assert found["rank1"].tolist() == [[rank == 1 for rank in ranks]]
    threshold = sorted(scores[8:])[0]  # one of the two non-mated queries may be above
    assert found["fpir"].tolist() == [[rank == 1 and score > threshold for rank, score in zip(ranks, scores)]]
    assert found["rank1"].sum() > found["fpir"].sum() > 0


def test_the_interval_of_flips_is_over_people():
    subject = np.array([0, 0, 0, 1, 1, 2])
    mated, old = np.ones((2, 6), bool), np.ones((2, 6), bool)
    mated[1, :3] = False
    new = np.array([[0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]], bool)
    draws = Bootstrap(3, 60, seed=1)
    few, _ = flips.negative_flips(old, new, mated, subject, draws)
    assert few["flips"] == 2 and few["interval"] is None
    five_times = [np.repeat(kind, 5, axis=-1) for kind in (old, new, mated, subject)]
    found, _ = flips.negative_flips(*five_times, draws)
    shares = [(w[0] + w[1]) / (3 * w[0] + 4 * w[1] + 2 * w[2]) for w in draws.weights.tolist()]
    assert found["rate"] == 2 / 9 and found["interval"] == pytest.approx(np.quantile(shares, [0.025, 0.975]))
