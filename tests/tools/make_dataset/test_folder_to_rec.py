"""A folder a person -> a training set: rows, classes, held-out people, what a run that ends early leaves."""

import collections
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from core.errors import UserError
from core.manifest import read_manifest
from dataset import RecordDataset
from tests.conftest import draw_image
from tools.ijbc_eval.align import REFERENCE
from tools.make_dataset.folder_to_rec import main, make
from tools.make_dataset.people import FolderError, choose_pairs

SCRIPT = pathlib.Path(__file__).resolve().parents[3] / "tools/make_dataset/folder_to_rec.py"
KINDS = {"jpg": ("JPEG", {"quality": 95}), "png": ("PNG", {}), "bmp": ("BMP", {}), "webp": ("WEBP", {"lossless": True})}


def draw_folder(root, counts, seed=0):
    """People `p0 0`, `p1 1`, …, with so many images each in all formats, some in sub-folders; returns {name: RGB}."""
    drawn = {}
    for person, count in enumerate(counts):
        for number in range(count):
            kind = list(KINDS)[(person + number) % len(KINDS)]
            name = f"p{person} {person}/{'video/' if number % 3 == 2 else ''}{number:02}.{kind}"
            drawn[name] = draw_image(np.random.default_rng([seed, person, number]))
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            form, options = KINDS[kind]
            Image.fromarray(drawn[name]).save(root / name, form, **options)
    return drawn


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_commands(files):
    """Manifests name the command, and so OUT."""
    return {path: data for path, data in files.items() if path.suffix != ".json"}


def lines(path):
    return path.read_text().splitlines()


def test_rows_classes_and_paths_belong_together(tmp_path):
    drawn = draw_folder(tmp_path / "in", [3, 1, 5, 2])
    (tmp_path / "in/empty").mkdir()
    (tmp_path / "in/.DS_Store").write_text("x")
    (tmp_path / "in/p0 0/.thumbs").mkdir()
    (tmp_path / "in/p0 0/.thumbs/1.jpg").write_text("x")
    said = make(tmp_path / "in", tmp_path / "sets/mine")
    assert said == f"{tmp_path / 'sets/mine'}: 11 images, 4 classes"
    out = RecordDataset(tmp_path / "sets/mine")
    names, classes = lines(tmp_path / "sets/mine/images.txt"), lines(tmp_path / "sets/mine/classes.txt")
    assert (len(out), out.num_classes) == (11, 4) and sorted(names) == sorted(drawn) and names != sorted(names)
    assert classes == sorted(classes) and len(classes) == 4
    for row, name in enumerate(names):
        image, label, _ = out[row]
        assert name.startswith(f"{classes[label]}/")
        assert np.abs(image.numpy().astype(int) - drawn[name]).mean() < (2 if name.endswith("jpg") else 0.01)
    for name in ("images.txt", "classes.txt"):
        assert read_manifest(tmp_path / "sets/mine" / name)["records"] == out.digest()
    assert sorted(path.name for path in (tmp_path / "sets").iterdir()) == ["mine"]
    assert sorted(path.name for path in (tmp_path / "sets/mine").iterdir()) == sorted(
        ["train.rec", "train.idx", "images.txt", "images.txt.json", "classes.txt", "classes.txt.json"]
    )


def test_the_same_seed_gives_the_same_bytes_whatever_the_workers(tmp_path):
    draw_folder(tmp_path / "in", [5] * 14)
    sets = {}
    for name, (workers, seed) in {"one": (0, 7), "many": (2, 7), "other": (0, 8)}.items():
        make(tmp_path / "in", tmp_path / name, val=0.4, seed=seed, workers=workers)
        sets[name] = without_commands(contents(tmp_path / name))
    assert sets["one"] == sets["many"] and sets["one"].keys() != sets["other"].keys()
    order, again = (sets[name][pathlib.Path("images.txt")].splitlines() for name in ("one", "other"))
    assert [line for line in order if line in again] != [line for line in again if line in order]


def test_photos_are_aligned_by_the_landmark_file_and_faces_of_112_kept(tmp_path):
    rng, list_, drawn = np.random.default_rng(0), [], {}
    for person in range(3):
        folder = tmp_path / f"in/p{person}"
        folder.mkdir(parents=True)
        for number in range(4):
            face, angle = draw_image(rng), rng.uniform(-0.5, 0.5)
            turn = 1.8 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            matrix = np.column_stack([turn, [200, 180] - turn @ [56, 56]])
            photo = cv2.warpAffine(face, matrix, (400, 360), borderMode=cv2.BORDER_REPLICATE)
            exif = Image.Exif()
            exif[0x0112] = 6  # stored lying on its side
            Image.fromarray(np.rot90(photo).copy()).save(folder / f"{number}.jpg", quality=97, exif=exif)
            points = REFERENCE @ turn.T + matrix[:, 2]
            list_.append(f"p{person}/{number}.jpg {' '.join(f'{v:.3f}' for v in points.ravel())} 0.99")
            drawn[f"p{person}/{number}.jpg"] = face
        Image.fromarray(draw_image(rng)).save(folder / "kept.png")
    (tmp_path / "l.txt").write_text("\n".join(list_))
    make(tmp_path / "in", tmp_path / "out", landmarks=tmp_path / "l.txt")
    out = RecordDataset(tmp_path / "out")
    for row, name in enumerate(lines(tmp_path / "out/images.txt")):
        if name in drawn:
            near = np.abs(out[row][0].numpy().astype(int) - drawn[name])[6:-6, 6:-6].mean()
            assert near < 5, f"{name}: {near}"
        else:
            assert out.reader.read_record(row + 1)[1] == (tmp_path / "in" / name).read_bytes()
    (tmp_path / "l.txt").write_text("\n".join(list_[1:]))
    with pytest.raises(FolderError, match=r"1 unusable.*p0/0.jpg \(400 x 360 pixels, .*; no line in l.txt\)"):
        make(tmp_path / "in", tmp_path / "again", landmarks=tmp_path / "l.txt")


def test_all_unusable_images_are_told_at_once_and_can_be_left_out(tmp_path):
    draw_folder(tmp_path / "in", [6, 6, 6, 1])
    bad = {"p0 0/a.jpg": b"no image", "p1 1/b c.png": b"", "loose.jpg": b"x", "notes.txt": b"y", "p2 2/tab\t.jpg": b"z"}
    bad["p2 2/page\f.jpg"] = b"z"
    for name, data in bad.items():
        (tmp_path / "in" / name).write_bytes(data)
    for number in range(2, 9):
        Image.fromarray(draw_image(np.random.default_rng(number), 113)).save(tmp_path / f"in/p3 3/{number}.png")
    with pytest.raises(FolderError) as error:
        make(tmp_path / "in", tmp_path / "out", workers=1)
    said = str(error.value)
    assert "13 unusable image(s)" in said and "and 8 more; photos need --landmarks FILE" in said and "\n" not in said
    listing = tmp_path / "out_unusable.txt"
    assert str(listing) in said and f"--skip {listing}" in said
    told = dict(line.split("\t") for line in lines(listing))
    assert len(told) == 13 and told["p1 1/b c.png"] == "empty file" and told["loose.jpg"] == "not in a person's folder"
    assert told["p2 2/tab?.jpg"] == "a tab or a line break in its name" and "113 x 113" in told["p3 3/5.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out_unusable.txt"]
    (tmp_path / "in/p2 2/tab\t.jpg").unlink()
    (tmp_path / "in/p2 2/page\f.jpg").unlink()
    assert make(tmp_path / "in", tmp_path / "out", skip=listing).endswith("19 images, 4 classes")
    assert not set(told) & set(lines(tmp_path / "out/images.txt"))


def test_a_person_all_of_whose_images_are_left_out_is_no_class(tmp_path):
    draw_folder(tmp_path / "in", [2, 2, 2])
    (tmp_path / "skip").write_text("p1 1/00.png\np1 1/01.bmp\n")
    assert make(tmp_path / "in", tmp_path / "out", skip=tmp_path / "skip").endswith("4 images, 2 classes")
    assert lines(tmp_path / "out/classes.txt") == ["p0 0", "p2 2"]
    assert RecordDataset(tmp_path / "out").labels().max() == 1


def test_a_folder_of_photos_without_landmarks_is_refused_after_a_thousand(tmp_path, monkeypatch):
    from tools.make_dataset import folder_to_rec

    monkeypatch.setattr(folder_to_rec, "_HOPELESS", 64)
    (tmp_path / "in/p").mkdir(parents=True)
    Image.fromarray(draw_image(np.random.default_rng(0), 200)).save(tmp_path / "in/p/0.png")
    for number in range(1, 200):
        os.link(tmp_path / "in/p/0.png", tmp_path / f"in/p/{number}.png")
    with pytest.raises(FolderError, match="the first 64 unusable image.*photos need --landmarks FILE"):
        make(tmp_path / "in", tmp_path / "out")
    assert make(tmp_path / "in", tmp_path / "out", resize=True).endswith("200 images, 1 classes")


def test_odd_landmarks_are_noted(tmp_path):
    (tmp_path / "in/p").mkdir(parents=True)
    for number in range(5):
        Image.fromarray(draw_image(np.random.default_rng(number), 130)).save(tmp_path / f"in/p/{number}.png")
    points = [REFERENCE] * 4 + [REFERENCE[[1, 0, 2, 4, 3]]]
    (tmp_path / "l.csv").write_text(
        "".join(f"p/{number}.png,{','.join(map(str, its.ravel()))}\n" for number, its in enumerate(points))
    )
    said = make(tmp_path / "in", tmp_path / "out", landmarks=tmp_path / "l.csv")
    assert "note: 1 of 5 aligned images have landmarks unlike an upright face, such as p/4.png" in said


# --- held-out people ------------------------------------------------------------------------------------------------


def test_held_out_people_are_enrolled_but_for_a_fifth(tmp_path):
    draw_folder(tmp_path / "in", [4] * 30 + [1] * 20)
    said = make(tmp_path / "in", tmp_path / "out", val=0.5, seed=3)
    assert said.endswith("40 images, 25 classes; held out 25 people, 100 images, 160 pairs")
    out = tmp_path / "out"
    trained = {line.split("/")[0] for line in lines(out / "images.txt")}
    gallery, probe = ({path.name for path in (out / side).iterdir()} for side in ("gallery", "probe"))
    assert len(gallery) == 20 and len(probe) == 25 and gallery < probe and not trained & probe
    assert trained | probe == {f"p{number} {number}" for number in range(50)}
    for person in probe:
        files = [sorted((out / side / person).glob("*")) for side in ("gallery", "probe")]
        assert [len(side) for side in files] == ([2, 2] if person in gallery else [0, 4])
        for path in files[0] + files[1]:
            image = cv2.imread(str(path))
            assert image.shape == (112, 112, 3) and path.suffix in (".jpg", ".png")
            source = tmp_path / "in" / person / path.name.replace("video-", "video/").replace("p.png", "p")
            assert source.is_file()
            if path.name == source.name:
                assert source.read_bytes() == path.read_bytes()


def test_pairs_are_balanced_in_each_tenth_and_share_no_one(tmp_path):
    draw_folder(tmp_path / "in", [4] * 30 + [6] * 10)
    make(tmp_path / "in", tmp_path / "out", val=0.75, seed=1)
    pairs = [line.split("\t") for line in lines(tmp_path / "out/pairs.txt")]
    assert len(pairs) % 20 == 0 and len(set(map(tuple, pairs))) == len(pairs)
    assert [pair[2] for pair in pairs] == ["1", "0"] * (len(pairs) // 2)
    folds = []
    for fold in np.array_split(np.array(pairs), 10):
        people = [[path.split("/")[1] for path in side] for side in fold.T[:2]]
        for first, second, pair in zip(*people, fold):
            assert pair[0].startswith("gallery/") and pair[1].startswith("probe/")
            assert (first == second) == (pair[2] == "1")
            assert all((tmp_path / "out" / path).is_file() for path in pair[:2])
        folds.append({*people[0], *people[1]})
    assert sum(map(len, folds)) == len(set().union(*folds)) == 24
    assert read_manifest(tmp_path / "out/pairs.txt")["what"] == "pairs"


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=40), seed=st.integers(0, 99)
)
def test_pairs_of_any_sizes(counts, seed):
    ends = np.cumsum([0, *(g + p for g, p in counts)])
    gallery = [np.arange(end, end + g) for end, (g, _) in zip(ends, counts)]
    probe = [np.arange(end + g, end + g + p) for end, (g, p) in zip(ends, counts)]
    person = np.repeat(np.arange(len(counts)), np.diff(ends))
    pairs = choose_pairs(gallery, probe, seed)
    assert pairs and len(set(pairs)) == len(pairs) and pairs == choose_pairs(gallery, probe, seed)
    enrolled, tested = set(np.concatenate(gallery).tolist()), set(np.concatenate(probe).tolist())
    for place, (first, second, same) in enumerate(pairs):
        assert first in enrolled and second in tested and same == (person[first] == person[second]) == 1 - place % 2
    per_person = collections.Counter(person[first] for first, _, same in pairs if same)
    assert max(per_person.values()) <= 10
    if len(counts) >= 20:
        folds = [
            {*person[first], *person[second]} for first, second, _ in map(np.transpose, np.split(np.array(pairs), 10))
        ]
        assert sum(map(len, folds)) == len(set().union(*folds))


@pytest.mark.parametrize(
    "counts, val, reason",
    [
        ([4] * 10, 0.1, "holds out 1 of 10 people, of whom 10 have two images or more; at least 3"),
        ([1] * 10, 0.5, "holds out 5 of 10 people, of whom 0 have two"),
        ([4] * 4, 0.9, "holds out 4 of 4 people"),
    ],
)
def test_a_share_that_leaves_no_one_is_refused(tmp_path, counts, val, reason):
    draw_folder(tmp_path / "in", counts)
    with pytest.raises(FolderError, match=reason):
        make(tmp_path / "in", tmp_path / "out", val=val)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# --- what a run leaves ----------------------------------------------------------------------------------------------


def test_a_killed_run_leaves_nothing_under_the_final_name_and_the_next_is_whole(tmp_path):
    draw_folder(tmp_path / "in", [4] * 8)
    make(tmp_path / "in", tmp_path / "undisturbed")
    slow = "import runpy, sys, time, tools.make_dataset.photos as photos\n"
    slow += "encode = photos.encoded_face\n"
    slow += "photos.encoded_face = lambda *words: (time.sleep(0.1), encode(*words))[1]\n"
    slow += f"sys.argv = ['slow', *sys.argv[1:]]\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    words = [str(tmp_path / "in"), str(tmp_path / "out"), "--val", "0.5", "--workers", "2"]
    run = subprocess.Popen([sys.executable, "-c", slow, *words], cwd=SCRIPT.parents[2])
    part, deadline = tmp_path / ".out.tmp", time.monotonic() + 120
    while not list(part.glob("gallery/*/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(UserError, match=r"\.out\.tmp/\.lock: held by process"):
        make(tmp_path / "in", tmp_path / "out")  # one run at a time
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert list(part.glob("gallery/*/*")) and not (tmp_path / "out").exists()
    make(tmp_path / "in", tmp_path / "out")
    assert without_commands(contents(tmp_path / "out")) == without_commands(contents(tmp_path / "undisturbed"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "undisturbed"]


def test_memory_does_not_grow_with_the_images(tmp_path):
    """Apart from 8 bytes an image; paths alone would be over 60."""
    peaks = []
    (tmp_path / "0/p").mkdir(parents=True)
    Image.fromarray(draw_image(np.random.default_rng(0))).save(tmp_path / "0/p/0.jpg")
    for size, (people, images) in {"few": (10, 80), "many": (30, 80)}.items():
        for number in range(people * images):
            path = tmp_path / size / f"person with a long name {number // images}" / f"{number % images}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(tmp_path / "0/p/0.jpg", path)
        tracemalloc.start()
        make(tmp_path / size, tmp_path / f"{size}_set")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1600 * 40, peaks


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, reason",
    [
        ("{0}/none {0}/out", "none: not a directory"),
        ("{0}/in {0}/in/out", "lies in .*, whose folders are people"),
        ("{0}/in {0}/there", "there: exists already"),
        ("{0}/hollow {0}/out", "no image in a folder below it"),
        ("{0}/in {0}/out --landmarks {0}/none.txt", "none.txt"),
        ("{0}/in {0}/out --skip {0}/none.txt", r"--skip .*none.txt: cannot be read \(No such file.*it is the list"),
        ("{0}/in {0}/out --val 1", "must be at least 0 and below 1"),
        ("{0}/in {0}/out --resize --landmarks {0}/none.txt", "not allowed with"),
    ],
)
def test_a_wrong_command_is_one_line(tmp_path, capsys, words, reason):
    draw_folder(tmp_path / "in", [2, 2])
    (tmp_path / "there").mkdir()
    (tmp_path / "hollow/p").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit):
        main(words.format(tmp_path).split())
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(reason, said), said
    assert sorted(tmp_path.rglob("*")) == before


def test_the_script_says_what_it_made(tmp_path, capsys):
    draw_folder(tmp_path / "in", [2, 3])
    main([str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "0"])
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 5 images, 2 classes\n"
