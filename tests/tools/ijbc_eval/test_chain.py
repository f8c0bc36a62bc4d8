"""--chain: the matrix, its pairs, AC and AM, and a gallery that several versions have written, by hand from angles."""

import json

import numpy as np
import pytest

from core.errors import UserError
from tools.ijbc_eval import chain, compat_report
from tools.ijbc_eval.comparison import Test as Measured

OFFSETS = {"v1": 0, "v2": -9, "v3": 17}
GALLERY = {"Ann": [10], "Bob": [50], "Cy": [90]}
PROBES = {"Ann": [10, 16, 26], "Bob": [25, 31, 54], "Cy": [82, 95, 106], "Dora": [35, 118]}
PAIRS = [("Ann", 16, 1), ("Bob", 31, 1), ("Cy", 106, 1), ("Ann", 31, 0), ("Bob", 82, 0), ("Cy", 54, 0)]


def search(offsets_of_gallery, offset):
    """`(top-1, TPIR with no false alarm)` by hand: the version's offset of each person's entry, that of the query."""
    right, strangers = [], []
    for person, values in PROBES.items():
        for value in values:
            off = {
                name: abs(value + offset - enrolled[0] - offsets_of_gallery[name]) for name, enrolled in GALLERY.items()
            }
            nearest = min(off, key=off.get)
            if person in GALLERY:
                right.append(off[person] if nearest == person else None)
            else:
                strangers.append(off[nearest])
    top1 = np.mean([distance is not None for distance in right])
    return top1, np.mean([distance is not None and distance < min(strangers) for distance in right])


def verify(offsets_of_gallery, offset):
    """TPR with no false match, by hand."""
    off = [(abs(value + offset - GALLERY[name][0] - offsets_of_gallery[name]), label) for name, value, label in PAIRS]
    least = min(distance for distance, label in off if not label)
    return np.mean([distance < least for distance, label in off if label])


@pytest.fixture
def run(tmp_path, draw_crop, degree_models):
    for side, people in (("gallery", GALLERY), ("probe", PROBES)):
        for person, values in people.items():
            for value in values:
                draw_crop(tmp_path / side / person / f"{value}.png", value)
    of = {value: person for person, values in PROBES.items() for value in values}
    lines = [f"gallery/{a}/{GALLERY[a][0]}.png\tprobe/{of[b]}/{b}.png\t{label}\n" for a, b, label in PAIRS]
    (tmp_path / "pairs.txt").write_text("".join(lines))
    models = degree_models(**OFFSETS)
    given = {
        "pairs": ["--pairs", str(tmp_path / "pairs.txt"), str(tmp_path)],
        "folders": ["--gallery", str(tmp_path / "gallery"), "--probe", str(tmp_path / "probe")],
    }

    def call(*sets, words=(), versions=tuple(OFFSETS)):
        words = [
            *(word for name in sets for word in given[name]),
            "--workers",
            "0",
            "--out",
            str(tmp_path / "o"),
            *words,
        ]
        compat_report.main(["--chain", *(f"{name}={models[name]}" for name in versions), *words])
        return json.loads((tmp_path / "o" / "chain.json").read_text()), (tmp_path / "o" / "chain.md").read_text()

    return call


def check(found, by_hand):
    """by_hand(offsets of the gallery's people, offset of the query)."""
    names = list(OFFSETS)
    matrix = [
        [by_hand(dict.fromkeys(GALLERY, OFFSETS[k]), OFFSETS[t]) for k in names[: row + 1]]
        for row, t in enumerate(names)
    ]
    assert found["matrix"] == matrix
    holds = {(t, k): matrix[t][k] > matrix[k][k] for t in range(3) for k in range(t)}
    assert {(names.index(one["query"]), names.index(one["gallery"])): one["holds"] for one in found["pairs"]} == holds
    assert found["ac"] == pytest.approx(sum(holds.values()) / 3)
    assert found["am"] == pytest.approx(np.mean([value for row in matrix for value in row]))
    assert found["mixed"] == by_hand(dict(zip(GALLERY, OFFSETS.values())), OFFSETS["v3"])
    return matrix, holds


def test_a_chain_of_three(run, capsys):
    found, text = run("pairs", "folders", words=["--bootstrap", "30"])
    tpir, holds = check(found["measures"]["tpir"], lambda *of: search(*of)[1])
    check(found["measures"]["top1"], lambda *of: search(*of)[0])
    check(found["measures"]["tpr"], verify)
    assert tpir == [[5 / 9], [6 / 9, 5 / 9], [0, 2 / 9, 5 / 9]]
    assert list(holds.values()) == [True, False, False] and found["measures"]["tpir"]["mixed"] == 4 / 9
    assert [version["people"] for version in found["versions"]] == [1, 1, 1]
    assert "people in the order of their names, 1 by v1, 1 by v2, 1 by v3" in text
    shown = capsys.readouterr().out
    pair = next(iter(holds))
    assert f"{100 * tpir[pair[0]][pair[1]]:.2f} {'holds' if holds[pair] else 'fails'}" in shown
    assert f"AC {found['measures']['tpir']['ac']:.2f}, {sum(holds.values())} of 3 pairs hold" in shown
    assert all("interval" in one for one in found["measures"]["tpir"]["pairs"])


def test_a_chain_of_pairs_or_of_folders_alone(run):
    of_pairs = run("pairs", words=["--bootstrap", "0"])[0]["measures"]
    of_folders = run("folders", words=["--bootstrap", "0"])[0]["measures"]
    assert (set(of_pairs), set(of_folders)) == ({"tpr", "accuracy"}, {"tpir", "top1"})
    check(of_folders["tpir"], lambda *of: search(*of)[1])


def test_two_versions_share_an_odd_gallery(run, tmp_path):
    found = run("folders", versions=("v1", "v2"), words=["--bootstrap", "0"])[0]
    assert len(found["measures"]["tpir"]["pairs"]) == 1
    assert [version["people"] for version in found["versions"]] == [2, 1]
    lines = (tmp_path / "o" / "chain.csv").read_text().splitlines()
    assert lines[0] == "figure,query,gallery,value,low,high" and any(line.startswith("tpir AC,,,") for line in lines)


def test_ac_and_am_of_a_matrix():
    """C = [[0.5], [0.6, 0.7], [0.5, 0.8, 0.9]]: 2/1 and 3/2 hold; 3/1 only equals. AC 2/3, AM 4.0/6."""
    tests = [[Measured(None, [], {"top1": value}, {}) for value in row] for row in ([0.5], [0.6, 0.7], [0.5, 0.8, 0.9])]
    found = chain.of_measure("top1", tests, ["v1", "v2", "v3"])
    assert [one["holds"] for one in found["pairs"]] == [True, False, True]
    assert (found["ac"], found["am"]) == pytest.approx((2 / 3, 4 / 6))


def test_wrong_chains(run, tmp_path):
    with pytest.raises(UserError, match="--chain: two models are named 'v1'; give each its own NAME=MODEL"):
        run("folders", versions=("v1", "v1"))
    with pytest.raises(SystemExit):
        run("folders", versions=("v1",))
    with pytest.raises(SystemExit):
        run("folders", words=["--old", "x.pt"])
