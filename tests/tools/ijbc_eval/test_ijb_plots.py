"""What a curve looks like, where its name stands, and where the axes end."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.ijbc_eval import plots, results


def test_no_two_curves_look_alike():
    looks = [tuple(plots.style(number).values()) for number in range(196)]
    assert len(set(looks)) == 196
    for one, other in zip(looks[:7], looks[1:7]):
        assert one[0] != other[0] and one[1] != other[1] and one[2] != other[2]  # neighbours in all three


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 0.2)), min_size=1, max_size=12))
def test_names_do_not_overlap_and_keep_the_order_of_the_curves(ends):
    places, room = zip(*ends)
    found = plots.spread(places, room)
    order = sorted(found, key=found.get)
    assert [places[row] for row in order] == sorted(places)
    for low, high in zip(order, order[1:]):
        assert found[high] - found[low] >= (room[low] + room[high]) / 2 - 1e-9
    if sum(room) <= 1:
        assert all(room[row] / 2 - 1e-9 <= place <= 1 - room[row] / 2 + 1e-9 for row, place in found.items())


def test_names_with_room_stay_where_they_are():
    assert plots.spread([0.9, 0.1, 0.5], [0.1, 0.1, 0.1]) == pytest.approx({0: 0.9, 1: 0.1, 2: 0.5})


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("MixBCT", ["MixBCT"]),
        ("f128_tiny_softmax", ["f128_tiny_", "softmax"]),
        ("two words here", ["two words", "here"]),
        ("x" * 25, ["x" * 10, "x" * 10, "x" * 5]),
        ("a\nb", ["a", "b"]),
        ("", [""]),
    ],
)
def test_wrapped(name, lines):
    assert plots.wrapped(name, 10).split("\n") == lines


@pytest.fixture
def drawn(monkeypatch):
    """The axes of each figure, kept when it is saved."""
    kept = []
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, *rest: (kept.append(figure.axes[0]), save(figure, *rest))[1])
    return kept


def test_roc_where_the_curves_are(tmp_path, drawn):
    rng = np.random.default_rng(0)
    label = np.arange(4000) % 2 == 0
    scores = np.stack([rng.normal(shift * label, 1) for shift in (4.0, 4.5)]).astype(np.float32)
    result = results.verification_result(["one model", "another"], scores, label, "IJBC")
    paths = plots.plot_verification([result], tmp_path / "a.b")
    roc, det = drawn
    lowest = min(line.get_ydata().min() for line in roc.lines)
    assert 0.3 < lowest - 0.1 < roc.get_ylim()[0] < lowest and 1 < roc.get_ylim()[1] < 1.1
    misses = np.concatenate([line.get_ydata() for line in det.lines])
    assert np.nanmin(misses) / 2 < det.get_ylim()[0] < np.nanmin(misses)
    assert {text.get_text().split("\n")[0] for text in roc.texts} == {"one model", "another"}
    assert len({(line.get_linestyle(), line.get_marker()) for line in roc.lines}) == 2
    assert [path for path in paths] == [f"{tmp_path / 'a.b'}_roc.png", f"{tmp_path / 'a.b'}_det.png"]
    for path in paths:
        assert cv2.imread(path).shape[1] <= 1600
        assert (tmp_path / path).with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_a_perfect_model_has_no_det(tmp_path, drawn):
    scores = np.array([[0.9, 0.8, 0.1, 0.2]], np.float32)
    result = results.verification_result(["perfect"], scores, np.array([True, True, False, False]), "IJBC")
    plots.plot_verification([result], tmp_path / "p")
    assert [len(axes.texts) for axes in drawn] == [1, 0]


def test_a_figure_is_the_same_bytes_at_any_time(tmp_path, monkeypatch):
    def saved(moment):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", moment)  # matplotlib's clock
        figure, axes = plots.plt.subplots(figsize=(1, 1))
        axes.plot([0, 1], [0, 1])
        path = plots.save(figure, tmp_path / "plot.png")
        return path.read_bytes(), path.with_suffix(".pdf").read_bytes()

    assert saved("1000000000") == saved("2000000000")
