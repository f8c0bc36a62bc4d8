"""Lists of pairs, folders and .bin files: figures worked out by hand from angles, the report, and wrong input."""

import json
import pickle
import re

import numpy as np
import pytest

from core.errors import UserError
from tools.ijbc_eval import compat_over_seeds, compat_report, ijbc_eval, options
from tools.ijbc_eval.own_set import open_bin, open_crops

# Degrees of the first and the second image of each pair, and whether they are one person's.
PAIRS = [
    (10, 15, 1), (40, 70, 0), (80, 90, 1), (120, 180, 0), (20, 40, 1),
    (60, 150, 0), (100, 140, 1), (30, 150, 0), (50, 24, 1), (90, 115, 0),
]  # fmt: skip
LABEL = np.array([label for *_, label in PAIRS], bool)
# Degrees of the images of each person; Dora is in no gallery.
GALLERY = {"Ann": [10, 30], "Bob": [60], "Cy": [110]}
PROBES = {"Ann": [33, 12], "Bob": [72, 92], "Cy": [112], "Dora": [150, 78, 20]}


def cosines(offset):
    """Of the pairs, the second image by a model that adds `offset` to what the first one's adds."""
    return [np.cos(np.deg2rad(second + offset - first)) for first, second, _ in PAIRS]


def accuracy_by_hand(scores):
    """Ten folds of one pair, each with the best threshold, 0, 0.01, … of the squared distance, on the other nine."""
    distances, right = [2 - 2 * score for score in scores], []
    for out in range(10):
        rest = [(d, same) for row, (d, same) in enumerate(zip(distances, LABEL)) if row != out]
        best = max((t / 100 for t in range(400)), key=lambda t: sum((d < t) == same for d, same in rest))
        right.append((distances[out] < best) == LABEL[out])
    return float(np.mean(right))


@pytest.fixture
def pairs(tmp_path, draw_crop):
    """pairs.txt and its images in folders with blanks and umlauts."""
    lines = []
    for number, (first, second, label) in enumerate(PAIRS):
        names = [f"Zoë B/{number} {side}.png" for side in "ab"]
        for name, value in zip(names, (first, second)):
            draw_crop(tmp_path / "root" / name, value)
        lines.append("\t".join([*names, str(label)]))
    (tmp_path / "pairs.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ["--pairs", str(tmp_path / "pairs.txt"), str(tmp_path / "root")]


@pytest.fixture
def bin_file(tmp_path, pairs):
    names = [name for line in (tmp_path / "pairs.txt").read_text().splitlines() for name in line.split("\t")[:2]]
    encoded = [(tmp_path / "root" / name).read_bytes() for name in names]
    (tmp_path / "own.bin").write_bytes(pickle.dumps((encoded, LABEL.tolist())))
    return ["--bin", str(tmp_path / "own.bin")]


@pytest.fixture
def folders(tmp_path, draw_crop):
    for side, people in (("gallery", GALLERY), ("probe", PROBES)):
        for person, values in people.items():
            for number, value in enumerate(values):
                draw_crop(tmp_path / side / person / f"{number}.png", value)
    return ["--gallery", str(tmp_path / "gallery"), "--probe", str(tmp_path / "probe")]


@pytest.fixture
def evaluate(tmp_path, degree_models):
    """Run ijbc_eval.py with a new model of offset 7, an old one of offset 0; gives the arrays of the result."""
    models = degree_models(old=0, new=7)

    def run(*words, cross=False):
        old = ["-m_old", models["old"]] if cross else []
        ijbc_eval.main(["-m", models["new"], *old, "--workers", "0", "-R", str(tmp_path / "r.npz"), *map(str, words)])
        with np.load(tmp_path / "r.npz") as saved:
            return {key: saved[key] for key in saved.files}

    return run


@pytest.mark.parametrize("cross", [False, True])
def test_pairs_by_hand(evaluate, pairs, cross, capsys):
    found, expected = evaluate(*pairs, cross=cross), cosines(7 if cross else 0)
    np.testing.assert_allclose(found["scores"][0], expected, atol=1e-6)
    np.testing.assert_array_equal(found["label"], LABEL)
    # No impostor is allowed at 0.001, 0.01 and 0.1: the genuine pairs above the highest of five.
    above = np.mean([score > max(np.array(expected)[~LABEL]) for score in np.array(expected)[LABEL]])
    assert found["fprs"].tolist() == [1e-3, 1e-2, 1e-1] and found["tprs"][0].tolist() == [above] * 3
    assert above == (0.8 if cross else 0.6)  # degrees: 12, 17, 27, 47, 19 against 32; 5, 10, 20, 40, 26 against 25
    assert found["accuracy"][0] == accuracy_by_hand(expected)
    assert f"{100 * found['accuracy'][0]:.2f}" in capsys.readouterr().out


def test_a_bin_file_gives_the_figures_of_its_pairs(evaluate, pairs, bin_file):
    listed, packed = evaluate(*pairs, cross=True), evaluate(*bin_file, cross=True)
    for key in ("scores", "label", "tprs", "auc", "accuracy"):
        np.testing.assert_array_equal(listed[key], packed[key])
    assert (str(listed["subset"]), str(packed["subset"])) == ("root", "own")


def test_saved_results_keep_their_rates(evaluate, pairs, tmp_path, capsys):
    evaluate(*pairs)
    shown = capsys.readouterr().out.split("plot:")[0]
    ijbc_eval.main(["-P", str(tmp_path / "r.npz")])
    assert capsys.readouterr().out.split("plot:")[0] == shown and "ten-fold accuracy" in shown


@pytest.mark.parametrize("cross", [False, True])
def test_folders_by_hand(evaluate, folders, cross):
    found, offset = evaluate(*folders, cross=cross), 7 if cross else 0
    ranks, own, strangers = [], [], []
    for person, values in PROBES.items():
        for value in values:  # a person counts with the nearest of the gallery images
            near = {name: min(abs(value + offset - one) for one in enrolled) for name, enrolled in GALLERY.items()}
            if person in GALLERY:
                ranks.append(sorted(near, key=near.get).index(person) + 1)
                own.append(np.cos(np.deg2rad(near[person])) if ranks[-1] == 1 else -np.inf)
            else:
                strangers.append(np.cos(np.deg2rad(min(near.values()))))
    assert found["galleries"].tolist() == ["gallery"]
    assert found["label"].tolist() == [[True] * 5 + [False] * 3]
    assert found["rank"][0, 0].tolist() == [*ranks, 0, 0, 0]
    assert ranks == ([1, 1, 1, 2, 1] if cross else [1, 1, 1, 2, 1])
    np.testing.assert_allclose(found["scores"][0, 0], [*own, *strangers], atol=1e-6)
    above = np.mean([score > max(strangers) for score in own])
    assert found["fpirs"].tolist() == [1e-3, 1e-2, 1e-1, 1] and found["tpirs"][0, 0].tolist() == [above] * 3 + [0.8]
    assert found["top_rates"][0, 0].tolist() == [0.8, 1, 1]


def test_one_test_needs_no_option(evaluate, folders, pairs):
    assert str(evaluate(*folders)["task"]) == "1N"
    assert str(evaluate(*pairs)["task"]) == str(evaluate(*pairs, *folders)["task"]) == "11"
    assert str(evaluate(*pairs, *folders, "-N")["task"]) == "1N"


def test_images_of_both_lists_are_embedded_once(tmp_path, folders):
    (tmp_path / "pairs.txt").write_text(
        "gallery/Ann/0.png\t./probe/Ann/1.png\t1\ngallery/Bob/0.png\tprobe/Cy/0.png\t0\n"
    )
    made = open_crops((tmp_path / "pairs.txt", tmp_path), tmp_path / "gallery", tmp_path / "probe")
    assert len(made.faces().names) == 4 + 8
    assert sorted(made.faces().names)[0] == "gallery/Ann/0.png"


@pytest.fixture
def people_of(tmp_path):
    """`({person: names of the images}, whether all people are known)` of lines `first second label`."""

    def people(*lines):
        (tmp_path / "pairs.txt").write_text("".join("\t".join(line.split()) + "\n" for line in lines))
        made = open_crops((tmp_path / "pairs.txt", tmp_path))
        faces = made.faces()
        names, person = made.people(faces, made.pairs(faces), {}, None)
        assert names.tolist() == sorted(set(names.tolist())) and set(person.tolist()) == set(range(len(names)))
        found = {name: sorted(faces.names[person == row].tolist()) for row, name in enumerate(names.tolist())}
        return found, made.people_known

    return people


def test_people_of_pairs_are_what_genuine_pairs_connect(people_of, capsys):
    found, known = people_of("c b 1", "b a 1", "d e 0", "a d 0", "c f 0", "f g 1", "a c 0")
    assert list(found.values()) == [["a", "b", "c"], ["d"], ["e"], ["f", "g"]] and not known
    assert "1 impostor pairs are of images that genuine pairs connect, the first a and c" in capsys.readouterr().err


def test_people_of_pairs_are_their_folders(people_of, capsys):
    """As folder_to_rec.py and LFW have them: a person's images lie in one folder, or in one on each side."""
    pairs = ["g/Ann/1 p/Ann/2 1", "g/Ann/3 p/Bob/4 0", "g/Bob/5 p/Ann/6 0", "g/Bob/7 p/Bob/8 1", "p/Cy/9 g/Bob/7 0"]
    found, known = people_of(*pairs)
    ann, bob = ["g/Ann/1", "g/Ann/3", "p/Ann/2", "p/Ann/6"], ["g/Bob/5", "g/Bob/7", "p/Bob/4", "p/Bob/8"]
    assert found == {"g/Ann": ann, "g/Bob": bob, "p/Cy": ["p/Cy/9"]} and known
    assert not capsys.readouterr().err


def test_folders_that_a_label_contradicts_are_not_people(people_of, capsys):
    found, known = people_of("passports/1 selfies/1 1", "passports/2 selfies/2 1", "passports/1 selfies/2 0")
    assert list(found.values()) == [["passports/1", "selfies/1"], ["passports/2", "selfies/2"]] and not known
    said = "1 impostor pairs lie in folders of one person, the first passports/1 and selfies/2; folders are not taken"
    assert said in capsys.readouterr().err


def test_an_image_that_a_bin_has_twice_is_one_persons(tmp_path, draw_crop):
    for value in (10, 20, 30):
        draw_crop(tmp_path / f"{value}.png", value)
    a, b, c = ((tmp_path / f"{value}.png").read_bytes() for value in (10, 20, 30))
    (tmp_path / "own.bin").write_bytes(pickle.dumps(([a, b, a, c, b, c], [True, False, False])))
    made = open_bin(tmp_path / "own.bin")
    faces = made.faces()
    names, person = made.people(faces, made.pairs(faces), {}, None)
    assert person.tolist() == [0, 0, 0, 1, 0, 1] and names.tolist() == ["0", "3"] and not made.people_known


def test_people_of_folders_keep_their_names(tmp_path, folders, draw_crop):
    draw_crop(tmp_path / "more" / "x.png", 20)
    (tmp_path / "pairs.txt").write_text("gallery/Ann/0.png\tmore/x.png\t1\ngallery/Bob/0.png\tprobe/Cy/0.png\t0\n")
    made = open_crops((tmp_path / "pairs.txt", tmp_path), tmp_path / "gallery", tmp_path / "probe")
    faces = made.faces()
    galleries = made.galleries(faces)
    names, person = made.people(faces, made.pairs(faces), galleries, made.probes(faces, galleries))
    of = dict(zip(faces.names.tolist(), names[person].tolist()))
    assert of["more/x.png"] == of["gallery/Ann/1.png"] == of["probe/Ann/0.png"] == "Ann"
    assert of["probe/Dora/2.png"] == "Dora" and sorted(names) == ["Ann", "Bob", "Cy", "Dora"]


# --- The report -------------------------------------------------------------------------------------------------------


@pytest.fixture
def report(tmp_path, degree_models):
    models = degree_models(old=0, new=7, free=40)

    def run(*words):
        models_given = ["--old", models["old"], "--new", f"N={models['new']}", "--independent", f"F={models['free']}"]
        compat_report.main(
            [*models_given, "--workers", "0", "--bootstrap", "50", "--out", str(tmp_path / "out"), *words]
        )
        out = tmp_path / "out"
        return json.loads((out / "report.json").read_text()), (out / "report.md").read_text(), out

    return run


def test_a_report_of_pairs_alone(report, pairs, capsys):
    found, text, out = report(*pairs, "--fpr", "0.2")
    # One of five impostors may pass: degrees 5, 10, 20, 40, 26 against 30; 12, 17, 27, 47, 19 against 37.
    assert (found["old"]["self"]["tpr"], found["new"][0]["cross"]["tpr"]) == (0.8, 0.8)
    assert found["old"]["self"]["tpr_at"] == {"0.001": 0.6, "0.01": 0.6, "0.1": 0.6}
    assert found["new"][0]["cross"]["accuracy"] == accuracy_by_hand(cosines(7))
    assert set(found["new"][0]["criterion"]) == {"tpr"} and "tpir" not in found["old"]["self"]
    assert "TPIR" not in text and "re-embedded" not in text and "Who loses" not in text and "deployed threshold" in text
    assert not (out / "backfill.png").exists() and (out / "models.png").exists()
    assert "TPIR" not in capsys.readouterr().out.replace("TPR", "") and "5 genuine and 5 impostor pairs" in text


def test_a_report_of_folders_alone(report, folders, tmp_path):
    found, text, out = report(*folders, "--flips", str(tmp_path / "flips.csv"))
    assert set(found["new"][0]["criterion"]) == {"tpir"} and "tpr" not in found["old"]["self"]
    assert {curve["way"] for curve in found["new"][0]["refresh"]} == {"plain"}  # no pairs, so no maps of scores
    assert "TPR" not in text and "deployed threshold" not in text and not (out / "calibration.csv").exists()
    assert not (out / "thresholds.png").exists() and (out / "backfill.png").exists()
    # Degrees to the own gallery: Ann 3 and 2, Bob 12 and 32 (Cy is nearer), Cy 2; a stranger has 10. New queries lie
    # 7 further on: 10, 9, 19, 39 and 9, and a stranger has 3.
    lines = [line.split(",") for line in (tmp_path / "flips.csv").read_text().splitlines()]
    assert [line[:3] + line[-1:] for line in lines if line[:2] == ["N", "cross-test"]] == [
        ["N", "cross-test", "FPIR 0.01", f"probe/{image}.png"] for image in ("Ann/0", "Ann/1", "Cy/0")
    ]


def test_a_report_of_both_is_that_of_each(report, pairs, folders, tmp_path):
    one, other = report(*pairs)[0], report(*folders)[0]
    both, text, _ = report(*pairs, *folders)
    for key, alone in (("tpr", one), ("tpir", other)):
        for test in ("cross", "self"):
            assert both["new"][0][test][key] == alone["new"][0][test][key]
    assert {curve["way"] for curve in both["new"][0]["refresh"]} == {"plain"}  # 5 impostors are too few for a map
    assert "People are known only as images that genuine pairs connect" in text
    assert "1:1 TPR" in text and "1:N TPIR" in text and "ten-fold" in text


def test_cohorts_and_orders_by_name(report, pairs, folders, tmp_path):
    (tmp_path / "groups.txt").write_text("Ann\tone\nBob\tother\nCy\tother\n")
    order = ["gallery/Cy/0.png", "gallery/Ann/1.png", "gallery/Bob/0.png", "gallery/Ann/0.png"]
    (tmp_path / "order.txt").write_text("\n".join(order) + "\n")
    found, _, _ = report(
        *pairs, *folders, "--cohorts", str(tmp_path / "groups.txt"), "--order", str(tmp_path / "order.txt")
    )
    assert set(found["old"]["thresholds"]["self"]["cohorts"]) == {"one", "other"}
    assert {curve["order"] for curve in found["new"][0]["refresh"]} == {"order"}


@pytest.mark.parametrize("alone, said, unsaid", [("pairs", "cross 1:1", "1:N"), ("folders", "cross 1:N", "1:1")])
def test_the_seeds_of_one_test_are_summed_up(report, pairs, folders, alone, said, unsaid, capsys):
    _, _, out = report(*(pairs if alone == "pairs" else folders))
    compat_over_seeds.main([str(out / "report.json"), str(out / "report.json"), "--out", str(out / "seeds.md")])
    tables = [line for line in (out / "seeds.md").read_text().splitlines() if line.startswith("|")]
    assert any(said in line for line in tables) and not any(unsaid in line for line in tables)


# --- Wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda text: text.replace("\t1\n", "\tyes\n", 1),
            r"pairs\.txt line 1: expected `first<TAB>second<TAB>1 or 0`",
        ),
        (lambda text: text.replace("\t", " "), r"pairs\.txt line 1: expected"),
        (lambda text: text + "\n", r"pairs\.txt line 11: expected"),
        (lambda text: "", r"pairs\.txt: 0 pairs; give genuine and impostor pairs"),
        (lambda text: text.replace("\t0", "\t1"), r"pairs\.txt: has no impostor \(label 0\) pair"),
        (lambda text: text.replace("\t1", "\t0"), r"pairs\.txt: has no genuine \(label 1\) pair"),
        (lambda text: text.replace("3 b.png", "33.png"), r"B/33\.png: no such image; --pairs .*pairs\.txt has it"),
    ],
)
def test_wrong_pairs(evaluate, pairs, tmp_path, change, message):
    path = tmp_path / "pairs.txt"
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        evaluate(*pairs)
    assert not (tmp_path / "r.npz").exists()


def test_images_of_another_size_are_refused(evaluate, pairs, folders, tmp_path, draw_crop):
    draw_crop(tmp_path / "root" / "Zoë B" / "4 a.png", 20, size=113)
    with pytest.raises(UserError, match=r"Zoë B/4 a\.png \(image is 112 x 113, not 112 x 112.*folder_to_rec\.py"):
        evaluate(*pairs)
    (tmp_path / "gallery" / "Bob" / "Thumbs.db").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"gallery/Bob/Thumbs\.db \(8 bytes that do not decode.*folder_to_rec\.py"):
        evaluate(*folders)
    with pytest.raises(UserError, match=r"gallery/Bob/Thumbs\.db: unusable, and each image of such a set counts"):
        evaluate(*folders, "--skip-bad-images")


def test_wrong_folders(evaluate, folders, tmp_path, draw_crop, report):
    (tmp_path / "probe" / "Eve").mkdir()
    with pytest.raises(UserError, match=r"probe/Eve: no image in it; remove the folder, or fill it"):
        evaluate(*folders)
    (tmp_path / "probe" / "Eve").rmdir()
    with pytest.raises(UserError, match=r"--gallery .*/gallery/Ann: no sub-folder; give a folder with a sub-folder"):
        evaluate("--gallery", tmp_path / "gallery" / "Ann", *folders[2:])
    with pytest.raises(UserError, match=r"--probe .*/none: cannot be read \(No such file or directory\)"):
        evaluate(*folders[:2], "--probe", tmp_path / "none")
    with pytest.raises(UserError, match="--gallery and --probe go together"):
        evaluate(*folders[:2])
    with pytest.raises(UserError, match="--bin is a set of its own"):
        evaluate(*folders, "--bin", tmp_path / "x.bin")
    draw_crop(tmp_path / "others" / "Eve" / "0.png", 3)
    with pytest.raises(UserError, match="nobody of the gallery is in the probe folder"):
        evaluate(*folders[:2], "--probe", tmp_path / "others")
    with pytest.raises(
        UserError,
        match=r"own: every probe is of a person in the gallery, so there is no FPIR".replace("own", tmp_path.name),
    ):
        report(*folders[:2], "--probe", str(tmp_path / "gallery"))


def test_a_set_without_a_gallery_has_no_one_to_n(evaluate, bin_file, tmp_path):
    with pytest.raises(UserError, match="-N: own has no gallery; give --gallery and --probe"):
        evaluate(*bin_file, "-N")
    (tmp_path / "own.bin").write_bytes(b"\x80\x03cos\nsystem\n.")
    with pytest.raises(UserError, match=r"own\.bin: not a verification set: it refers to"):
        evaluate(*bin_file)
    with pytest.raises(UserError, match=r"--bin .*none\.bin: no such file; check the path"):
        evaluate("--bin", tmp_path / "none.bin")


@pytest.mark.parametrize("label, said", [("1", "the same person's"), ("0", "different people")])
def test_labels_that_contradict_the_folders(folders, tmp_path, label, said, report):
    other = "Bob/0" if label == "1" else "Ann/1"
    (tmp_path / "pairs.txt").write_text(
        f"gallery/Ann/0.png\tprobe/{other}.png\t{label}\n" + "gallery/Ann/0.png\tprobe/Ann/0.png\t1\n"
        "gallery/Ann/0.png\tprobe/Cy/0.png\t0\n"
    )
    with pytest.raises(
        UserError, match=rf"pairs\.txt line 1: gallery/Ann/0\.png and .* are labelled {said}, but lie in"
    ):
        report("--pairs", str(tmp_path / "pairs.txt"), str(tmp_path), *folders)


def test_the_input_scale_is_that_of_training(pairs, tmp_path, degree_models, monkeypatch):
    parsed = ijbc_eval.parse_arguments(["-m", degree_models(a=0)["a"], *pairs])
    assert options.open_evaluation(parsed).store.input_scale == 127.5
    parsed.input_scale = 64.0
    assert options.open_evaluation(parsed).store.input_scale == 64.0


def test_bin_images_have_their_positions_as_names(bin_file):
    made = open_bin(bin_file[1])
    assert made.faces().names.tolist() == [str(number) for number in range(20)]
    assert re.search(r"own\.bin image 3$", made.images(None).path(3))


def test_results_of_two_sets_of_one_name_lie_beside_each_other(evaluate, tmp_path, bin_file, pairs):
    models = ["-m", str(tmp_path / "new.pt"), "--workers", "0"]
    other = tmp_path / "more" / "own.bin"
    other.parent.mkdir()
    other.write_bytes((tmp_path / "own.bin").read_bytes())
    for _ in range(2):
        for path in (bin_file[1], other):
            ijbc_eval.main([*models, "--bin", str(path)])
    assert len(list((tmp_path / "IJB_result").glob("new_own_11*.npz"))) == 2
