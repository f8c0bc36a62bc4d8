"""The landmark file: both forms, and each way in which it can be wrong."""

import pickle

import numpy as np
import pytest

from tools.ijbc_eval.align import REFERENCE
from tools.make_dataset.landmarks import LandmarkError, Landmarks

POINTS = " ".join(f"{value:.2f}" for value in REFERENCE.ravel())
COMMAS = POINTS.replace(" ", ",")


def written(path, *lines):
    path.write_bytes("\n".join(lines).encode())
    return path


def moved(by, mark=" "):
    return mark.join(f"{value:.2f}" for value in (REFERENCE + by).ravel())


@pytest.mark.parametrize(
    "name, lines",
    [
        ("l.txt", [f"Ann B/1.jpg {POINTS} 0.9", f"./Ça/2 x.png {moved(7)} 1", ""]),
        ("l.txt", [f"Ann B/1.jpg\t{POINTS} 0.9\r", f"Ça/2 x.png {moved(7)} 1"]),
        ("l.csv", ["name,lx,ly", f"Ann B/1.jpg,{COMMAS}", f'"Ça/2 x.png",{moved(7, ",")},0.9,640']),
        ("l.csv", [f"Ann B/1.jpg,{COMMAS}", "", f'"Ça/2 x.png",{moved(7, ",")}']),
    ],
)
def test_both_forms(tmp_path, name, lines):
    found = Landmarks(written(tmp_path / name, *lines))
    for marks in (found, pickle.loads(pickle.dumps(found))):
        np.testing.assert_allclose(marks[b"Ann B/1.jpg"], REFERENCE, atol=0.01)
        np.testing.assert_allclose(marks["Ça/2 x.png".encode()], REFERENCE + 7, atol=0.01)
        assert marks[b"Ann B/2.jpg"] is None and marks[b""] is None


def test_every_line_of_many_is_found(tmp_path):
    lines = [f"p{row % 7}/{row}.jpg {moved(row)} 1" for row in range(3000)]
    found = Landmarks(written(tmp_path / "l.txt", *np.random.default_rng(0).permutation(lines)))
    for row in range(3000):
        np.testing.assert_allclose(found[b"p%d/%d.jpg" % (row % 7, row)], REFERENCE + row, atol=0.01)


@pytest.mark.parametrize(
    "name, lines, reason",
    [
        ("l.txt", [f"a/1.jpg {POINTS} 1", f"a/2.jpg {POINTS}"], "l.txt line 2: expected a name and five points"),
        ("l.txt", [f"a/1.jpg {POINTS} 1", f"a/2.jpg {POINTS} 1".replace("38.29", "38,29")], "l.txt line 2: expected"),
        ("l.txt", [f"a/1.jpg {POINTS} 1", f"a/2.jpg {POINTS} 1".replace("38.29", "nan")], "l.txt line 2: expected"),
        ("l.csv", ["name,x1", f"a/1.jpg,{COMMAS}", "a/2.jpg,1,2,3"], "l.csv line 3: expected"),
        ("l.txt", [f"a/1.jpg {'3 3 ' * 5}1"], "l.txt line 1: expected"),
        ("l.csv", ["name,x1,y1"], "no line of landmarks"),
        ("l.txt", [""], "no line of landmarks"),
        ("l.txt", [f"a/1.jpg {POINTS} 1", f"a/2.jpg {POINTS} 1", f"./a/1.jpg {POINTS} 1"], "a/1.jpg is listed more"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, name, lines, reason):
    with pytest.raises(LandmarkError, match=reason):
        Landmarks(written(tmp_path / name, *lines))


IN_ANOTHER_ORDER = [REFERENCE[order] for order in ([1, 0, 2, 4, 3], [4, 3, 2, 1, 0], [2, 0, 1, 3, 4])]
NOT_TURNED_BY_EXIF = [REFERENCE[:, ::-1] * [1, -1] + [0, 112], REFERENCE[:, ::-1] * [-1, 1] + [112, 0]]


@pytest.mark.parametrize("points", IN_ANOTHER_ORDER + NOT_TURNED_BY_EXIF)
def test_points_unlike_an_upright_face_are_refused_before_hours_of_work(tmp_path, points):
    wrong = " ".join(f"{value:.2f}" for value in points.ravel())
    lines = [f"a/{row}.jpg {wrong if row % 3 else POINTS} 1" for row in range(9)]
    with pytest.raises(LandmarkError, match="6 of the first 9 lines have points unlike an upright face; write them"):
        Landmarks(written(tmp_path / "l.txt", *lines))
    lines = [f"a/{row}.jpg {POINTS if row % 3 else wrong} 1" for row in range(9)]
    Landmarks(written(tmp_path / "l.txt", *lines))  # full profiles look like this
