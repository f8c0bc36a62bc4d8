"""Each mistake in the data is one error that names file and line; no result is written."""

import pathlib
import re

import numpy as np
import pytest

from core.errors import UserError
from tools.ijbc_eval import compat_report, ijbc_eval


@pytest.fixture
def made(tmp_path, make_ijb):
    return make_ijb(tmp_path / "data", subjects=6, seed=3)


@pytest.fixture
def fails(tmp_path, monkeypatch, shared_models):
    """Check that an evaluation stops with a message that matches every one of the patterns, and leaves no result."""
    monkeypatch.chdir(tmp_path)

    def check(made, *patterns, options=()):
        arguments = ["-m", str(shared_models["new_model"]), "-net", "tiny", "-d", str(made.data_dir), "--workers", "0"]
        with pytest.raises(UserError) as caught:
            ijbc_eval.main([*arguments, *map(str, options)])
        for pattern in patterns:
            assert re.search(pattern, str(caught.value)), f"{pattern!r} not in: {caught.value}"
        assert not list(pathlib.Path().glob("IJB_result/*.*"))
        assert not list(pathlib.Path().rglob("*.tmp"))

    return check


def edit(path, number, change):
    """Replace line `number` (from 1) of a file by change(line); None takes it out."""
    lines = path.read_text().splitlines()
    changed = change(lines[number - 1])
    lines[number - 1 : number] = [] if changed is None else [changed]
    path.write_text("\n".join(lines) + "\n")


def test_a_landmark_line_without_an_image(made, fails):
    (made.root / "loose_crop" / "4.jpg").unlink()
    fails(made, r"ijbc_name_5pts_score\.txt line 4", r"loose_crop/4\.jpg does not exist")
    fails(made, r"line 4", options=["--skip-bad-images"])  # that option is for unreadable images alone


def test_a_face_without_landmarks(made, fails):
    edit(made.meta("name_5pts_score.txt"), 5, lambda line: None)
    fails(made, r"ijbc_face_tid_mid\.txt line 5", r"5\.jpg has no line in ijbc_name_5pts_score\.txt")


def test_landmarks_without_a_face(made, fails):
    edit(made.meta("face_tid_mid.txt"), 6, lambda line: None)
    fails(made, r"ijbc_name_5pts_score\.txt line 6", r"6\.jpg has no line in ijbc_face_tid_mid\.txt")


@pytest.mark.parametrize("name", ["img/3.jpg", "/absent/3.jpg", "1.jpg/3.jpg"])
def test_an_image_in_a_folder_that_is_not_there(made, fails, name):
    for end in ("name_5pts_score.txt", "face_tid_mid.txt"):
        edit(made.meta(end), 3, lambda line: line.replace("3.jpg", name, 1))
    fails(made, rf"ijbc_name_5pts_score\.txt line 3: image .*{name} does not exist; .* the folders that the list names")


def test_an_image_listed_twice(made, fails):
    edit(made.meta("name_5pts_score.txt"), 5, lambda line: f"{line}\n./{line}")
    fails(made, r"ijbc_name_5pts_score\.txt line 5", r"5\.jpg is listed again")
    edit(made.meta("name_5pts_score.txt"), 3, lambda line: f"{line}\n{line}")
    fails(made, r"ijbc_name_5pts_score\.txt line 3", r"3\.jpg is listed again")


@pytest.mark.parametrize(
    "change",
    [
        lambda line: " ".join(line.split()[:-1]),
        lambda line: f"{line} 7",
        lambda line: line.replace(".", "x", 3),
        lambda line: "",
        lambda line: "n" * 260 + line,
    ],
)
def test_a_damaged_landmark_line(made, fails, change):
    edit(made.meta("name_5pts_score.txt"), 7, change)
    fails(made, r"ijbc_name_5pts_score\.txt line 7: expected `name x1 y1")


@pytest.mark.parametrize("value", ["nan", "inf", "1e39"])
def test_landmarks_that_are_no_numbers(made, fails, value):
    edit(made.meta("name_5pts_score.txt"), 2, lambda line: " ".join([line.split()[0], value, *line.split()[2:]]))
    fails(made, r"ijbc_name_5pts_score\.txt line 2", "finite")


@pytest.mark.parametrize(
    ("score", "pattern"), [("1e39", "finite float32"), ("-0.1", "detection score -0.1: must not be")]
)
def test_a_detection_score_that_is_none(made, fails, score, pattern):
    edit(made.meta("name_5pts_score.txt"), 2, lambda line: f"{line.rsplit(' ', 1)[0]} {score}")
    fails(made, r"ijbc_name_5pts_score\.txt line 2", pattern)


@pytest.mark.parametrize("score", ["-0.0", "1e-60"])
def test_a_template_of_which_no_image_has_a_detection_score(made, fails, tmp_path, shared_models, score):
    template = made.faces[0][1]
    lines = [number for number, face in enumerate(made.faces, 1) if face[1] == template]
    assert len(lines) > 1
    for number in lines[1:]:
        edit(made.meta("name_5pts_score.txt"), number, lambda line: f"{line.rsplit(' ', 1)[0]} {score}")
    options = ["-m", str(shared_models["new_model"]), "-net", "tiny", "-d", str(made.data_dir), "--workers", "0"]
    ijbc_eval.main([*options, "-R", str(tmp_path / "there" / "one_is_left.npz")])
    (made.root / "loose_crop" / made.faces[0][0]).write_bytes(b"")
    fails(made, rf"face_tid_mid\.txt line 1: all images of template {template} are unus", options=["--skip-bad-images"])
    edit(made.meta("name_5pts_score.txt"), 1, lambda line: f"{line.rsplit(' ', 1)[0]} {score}")
    fails(made, rf"face_tid_mid\.txt line 1: all images of template {template} have the detection score 0")


def test_landmarks_of_another_picture(made, fails):
    edit(
        made.meta("name_5pts_score.txt"), 3, lambda line: line.split()[0] + " 900 900 930 900 915 915 905 930 925 930 1"
    )
    fails(made, r"3\.jpg \(its landmarks are outside the picture, 150 x 150 pixels, ijbc_name_5pts_score\.txt line 3\)")


@pytest.mark.parametrize("end", ["name_5pts_score.txt", "face_tid_mid.txt"])
def test_an_image_name_outside_ascii(made, fails, end):
    edit(made.meta(end), 2, lambda line: f"é{line}")
    fails(made, rf"ijbc_{re.escape(end)} line 2: .*'é2\.jpg' is not ASCII; rename")


def test_landmarks_in_one_point(made, fails):
    edit(made.meta("name_5pts_score.txt"), 2, lambda line: f"{line.split()[0]} {'50.0 ' * 10}0.9")
    fails(made, r"ijbc_name_5pts_score\.txt line 2", "one point")


@pytest.mark.parametrize("line", ["4.jpg 12", "4.jpg 12 a", "4.jpg -3 1", "4.jpg 3 1 9"])
def test_a_damaged_face_line(made, fails, line):
    edit(made.meta("face_tid_mid.txt"), 4, lambda _: line)
    fails(made, r"ijbc_face_tid_mid\.txt line 4")


@pytest.mark.parametrize(
    ("line", "pattern"),
    [
        ("99999 {1} {2}", "template 99999 has no face in ijbc_face_tid_mid"),
        ("{0} 3 {2}", "template 3 has no face"),
        ("{0} {1}", "expected `template template label`"),
        ("{0} {1} 2", "label 2"),
        ("{0} {1} x", "expected"),
    ],
)
def test_a_wrong_pair(made, fails, line, pattern):
    edit(made.meta("template_pair_label.txt"), 3, lambda old: line.format(*old.split()))
    fails(made, r"ijbc_template_pair_label\.txt line 3", pattern)


def test_pairs_of_one_kind_only(made, fails):
    path = made.meta("template_pair_label.txt")
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines() if line.endswith(" 0")))
    fails(made, r"ijbc_template_pair_label\.txt", "no genuine")


@pytest.mark.parametrize("end", ["gallery_G1", "gallery_G2", "probe_mixed"])
def test_a_template_without_faces(made, fails, end):
    path = made.meta(f"1N_{end}.csv")
    edit(path, 3, lambda line: f"5,{line.split(',', 1)[1]}")
    fails(made, rf"1N_{end}\.csv line 3", "template 5 has no face", options=["-N"])


@pytest.mark.parametrize("end", ["gallery_G2", "probe_mixed"])
def test_a_truncated_csv(made, fails, end):
    path = made.meta(f"1N_{end}.csv")
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:4])[: -len(lines[3]) // 2])
    fails(made, rf"1N_{end}\.csv line 4", "truncated", options=["-N"])


@pytest.mark.parametrize("ids", ["²,3", "3,²", f"{10**19},3", f"3,{10**19}", "-3,3"])
def test_a_csv_with_ids_that_are_none(made, fails, ids):
    edit(made.meta("1N_gallery_G1.csv"), 3, lambda line: f"{ids},{line.split(',', 2)[2]}")
    fails(made, r"1N_gallery_G1\.csv line 3: expected 4 fields", "at most 18 digits", options=["-N"])


@pytest.mark.parametrize("text", ["TEMPLATE_ID,SUBJECT_ID,FILENAME,FRAME\n", "TEMPLATE_ID,SUBJECT_ID,FILENAME,FRAME"])
def test_an_empty_gallery(made, fails, text):
    made.meta("1N_gallery_G1.csv").write_text(text)
    fails(made, r"1N_gallery_G1\.csv", "empty", options=["-N"])


def test_a_csv_without_header(made, fails):
    edit(made.meta("1N_gallery_G1.csv"), 1, lambda line: None)
    fails(made, r"1N_gallery_G1\.csv line 1", "TEMPLATE_ID,SUBJECT_ID", options=["-N"])


def test_a_template_of_two_subjects(made, fails):
    path = made.meta("1N_probe_mixed.csv")
    template, subject, rest = path.read_text().splitlines()[1].split(",", 2)
    edit(path, 2, lambda line: f"{line}\n{template},{int(subject) + 1},{rest}")
    fails(made, r"1N_probe_mixed\.csv line 3", f"subject {subject} in line 2", options=["-N"])


def test_a_gallery_that_no_probe_is_in(made, fails):
    path = made.meta("1N_gallery_G2.csv")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *(re.sub(r"^(\d+),\d+", r"\1,9", line) for line in lines[1:])]) + "\n")
    fails(made, "no probe is of a subject in ijbc_1N_gallery_G2", options=["-N"])


def test_people_that_the_lists_disagree_on(made, shared_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old, new = shared_models["old_model"], shared_models["new_model"]
    options = [
        "--old",
        f"{old}",
        "--old_net",
        "tiny",
        "--new",
        f"{new}:tiny",
        "-d",
        f"{made.data_dir}",
        "--workers",
        "0",
    ]
    path = made.meta("1N_probe_mixed.csv")
    whole, template = path.read_text(), made.galleries["G2"][0][0]
    path.write_text(f"{whole}{template},777,x,1\n")
    with pytest.raises(UserError, match=rf"1N_.*template {template} is of subject .* in another 1:N list"):
        compat_report.main(options)
    path.write_text("\n".join(whole.splitlines()[:-4]) + "\n")
    with pytest.raises(UserError, match=r"template_pair_label\.txt: template \d+ is in no 1:N list.*complete the csv"):
        compat_report.main(options)


def test_a_list_cut_off_at_a_lines_end_is_pointed_out(made, tmp_path, monkeypatch, shared_models, capsys):
    monkeypatch.chdir(tmp_path)
    path = made.meta("1N_probe_mixed.csv")
    path.write_text("\n".join(path.read_text().splitlines()[:-4]) + "\n")
    options = ["-m", str(shared_models["new_model"]), "-net", "tiny", "-d", str(made.data_dir), "--workers", "0"]
    ijbc_eval.main([*options, "-N"])
    assert re.search(r"\d+ templates are in no 1:N list", capsys.readouterr().err)
    path = made.meta("template_pair_label.txt")
    used = made.pairs[0][0]
    kept = [line for line in path.read_text().splitlines() if not line.startswith(f"{used} ")]
    path.write_text("\n".join(kept) + "\n")
    ijbc_eval.main(options)
    note = f"note: {path}: 1 templates are in no pair; is every list complete?"
    assert capsys.readouterr().err.count(note) == 1


@pytest.mark.parametrize("content", [b"", b"no image", "half"])
def test_an_unreadable_image(made, fails, tmp_path, shared_models, plain_class, capsys, content):
    faces = [face for face in made.faces if sum(other[1] == face[1] for other in made.faces) > 1]
    name = faces[0][0]
    path = made.root / "loose_crop" / name
    path.write_bytes(path.read_bytes()[:1500] if content == "half" else content)
    line = [face[0] for face in made.faces].index(name) + 1
    fails(made, re.escape(name), rf"ijbc_name_5pts_score\.txt line {line}", "--skip-bad-images")
    options = ["-m", str(shared_models["new_model"]), "-net", "tiny", "-d", str(made.data_dir), "--workers", "0"]
    ijbc_eval.main([*options, "--skip-bad-images", "-R", "result.npz"])
    with np.load("result.npz") as saved:
        assert saved["bad_images"].tolist() == [name]
        features = plain_class(made, shared_models["new_model"], skip=[name]).templates()
        expected = plain_class.pair_scores(made, features, features)
        np.testing.assert_allclose(saved["scores"][0], expected, atol=2e-5)
    assert "1 unusable image" in capsys.readouterr().out
    pathlib.Path("result.npz").unlink()
    for left in pathlib.Path().glob("result_*.png"):
        left.unlink()
    fails(made, re.escape(name))  # also when the embeddings come from the cache


def test_a_template_whose_images_are_all_unreadable(made, fails):
    template = made.faces[0][1]
    for face in made.faces:
        if face[1] == template:
            (made.root / "loose_crop" / face[0]).write_bytes(b"")
    fails(made, r"ijbc_face_tid_mid\.txt line 1", f"template {template} are", options=["--skip-bad-images"])


def test_a_model_that_cannot_be_loaded(made, fails, tmp_path):
    (tmp_path / "torn.pt").write_bytes(b"PK torn")
    fails(made, r"torn\.pt", options=["-m_old", tmp_path / "torn.pt", "-old_net", "tiny"])
    fails(made, r"model\.ckpt: unknown kind", options=["-m", "model.ckpt"])


def test_a_missing_directory_or_file(made, fails, tmp_path):
    fails(made, "IJBB/meta", "set -d", options=["-s", "IJBB"])
    made.meta("template_pair_label.txt").unlink()
    fails(made, r"ijbc_template_pair_label\.txt: cannot be read")


def test_an_earlier_result_survives_a_failure(made, tmp_path, monkeypatch, shared_models):
    monkeypatch.chdir(tmp_path)
    options = ["-m", str(shared_models["new_model"]), "-net", "tiny", "-d", str(made.data_dir), "--workers", "0"]
    options += ["-R", "r.npz"]
    ijbc_eval.main(options)
    before = pathlib.Path("r.npz").read_bytes()

    def fill(file, **arrays):
        file.write(b"half a result")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", fill)
    with pytest.raises(UserError, match=r"r\.npz: cannot be written \(no space left on device\); make room"):
        ijbc_eval.main(options)
    assert pathlib.Path("r.npz").read_bytes() == before
    assert not list(pathlib.Path().rglob(".*.tmp"))
