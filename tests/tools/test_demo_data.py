import collections
import json
import math
import pathlib
import signal
import subprocess
import sys

import cv2
import numpy as np
import pytest

from dataset import RecordDataset
from engine.verification import read_bin
from recordio import RecordReader, unpack
from tools.demo_data import capture, draw_demo_data, face, geometry, identity, ijb, records
from tools.demo_data.conditions import draw_conditions, next_frame
from tools.demo_data.draw_demo_data import main

OPTIONS = [
    "--seed",
    "3",
    "--identities",
    "4",
    "--images",
    "2",
    "--eval-identities",
    "6",
    "--probes",
    "2",
    "--verification-pairs",
    "6",
    "--processes",
    "1",
]


def person(number, seed=5):
    return records.person(seed, records.TRAINING, number)


def clear(rng, **changes):
    """Frontal, sharp, well-lit conditions."""
    conditions = draw_conditions(rng, variation=0.0)
    conditions.resolution, conditions.occluder = 1.0, ""
    for name, value in changes.items():
        assert hasattr(conditions, name)
        setattr(conditions, name, value)
    return conditions


# --- people ----------------------------------------------------------------------------------------------------------


def test_traits_are_continuous_and_bounded():
    rng = np.random.default_rng(0)
    a, b = identity.draw_identity(rng), identity.draw_identity(rng)
    between = [vars(identity.traits((1 - s) * a + s * b)) for s in np.linspace(0, 1, 101)]
    for name in between[0]:
        values = np.array([traits[name] for traits in between])
        mean, sd, *_ = identity.TRAITS[name]
        assert np.abs(np.diff(values)).max() < 0.2 * sd  # no jumps
        low, high = identity.BOUNDS.get(name, (-math.inf, math.inf))
        assert low <= values.min() and values.max() <= high
    assert sum(between[0][name] != between[-1][name] for name in between[0]) > 40


def test_identity_of_another_length_is_refused():
    with pytest.raises(ValueError, match=str(identity.DIMENSIONS)):
        identity.traits(np.zeros(identity.DIMENSIONS + 1))


def test_extreme_people_can_be_drawn():
    rng = np.random.default_rng(1)
    for vector in (np.full(identity.DIMENSIONS, 2.2), np.full(identity.DIMENSIONS, -2.2)):
        image = capture.aligned(identity.traits(vector), draw_conditions(rng, 1.5))
        assert image.shape == (112, 112, 3) and image.dtype == np.uint8 and image.std() > 5


def test_people_can_be_told_apart():
    """Nearest class mean over coarse pixels, calm conditions: far above the chance of 1 in 12."""

    def pictures(number):
        rng, who = person(number)
        images = [capture.aligned(who, draw_conditions(rng, 0.3)) for _ in range(6)]
        return np.stack([cv2.resize(image, (28, 28), interpolation=cv2.INTER_AREA) for image in images]).astype(float)

    images = np.stack([pictures(number)[:, :, 5:-5] for number in range(12)]).reshape(12, 6, -1)
    images -= images.mean(2, keepdims=True)
    means = images[:, :3].mean(1)
    distance = ((images[:, 3:, None] - means[None, None]) ** 2).sum(-1)
    assert (distance.argmin(2) == np.arange(12)[:, None]).mean() > 0.4


# --- geometry --------------------------------------------------------------------------------------------------------


def test_similarity_against_linear_least_squares():
    rng = np.random.default_rng(2)
    source, target = rng.standard_normal((2, 5, 2)) * 30
    rows, right = [], []
    for (x, y), (u, v) in zip(source, target):  # unknowns a, b, c, d of [[a, -b, c], [b, a, d]]
        rows += [[x, -y, 1, 0], [y, x, 0, 1]]
        right += [u, v]
    a, b, c, d = np.linalg.lstsq(np.array(rows), np.array(right), rcond=None)[0]
    np.testing.assert_allclose(geometry.similarity(source, target), [[a, -b, c], [b, a, d]], atol=1e-9)


@pytest.mark.parametrize("closed", [False, True])
def test_smooth_passes_through_its_points(closed):
    points = np.random.default_rng(3).standard_normal((3, 6, 2))
    curve = geometry.smooth(points, closed, steps=5)
    assert curve.shape == (3, 30 if closed else 26, 2)
    np.testing.assert_allclose(curve[:, ::5], points, atol=1e-12)
    np.testing.assert_allclose(curve[1], geometry.smooth(points[1], closed, steps=5))


def test_head_turns_as_a_rotation():
    """Against rotation matrices, without perspective."""
    who = person(0)[1]
    yaw, pitch = 0.4, -0.2
    points = np.random.default_rng(4).uniform(-50, 50, (20, 2))
    head = geometry.Head(who, yaw, pitch, distance=1e12)
    about_y = np.array([[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]])
    about_x = np.array([[1, 0, 0], [0, math.cos(pitch), -math.sin(pitch)], [0, math.sin(pitch), math.cos(pitch)]])
    for point, seen in zip(points, head.project(points, 3.0)):
        x, y = point[0] / (who.face_width + 5), (point[1] - 5) / 121
        z = 92 * math.sqrt(1 - x * x - y * y) + 3
        np.testing.assert_allclose(seen, (about_x @ about_y @ [*point, z])[:2], atol=1e-6)
    near = geometry.Head(who, 0.0, 0.0, distance=400.0).project(points)
    assert (np.abs(near) <= np.abs(points) + 1e-9).all()


# --- camera ----------------------------------------------------------------------------------------------------------


def test_landmarks_of_a_loose_crop_lie_on_the_pupils():
    for number in range(4):
        rng, who = person(number)
        conditions = clear(rng, roll=0.3, yaw=0.15, eye_open=1.3, gaze=(0.0, 0.6))
        image, landmarks = capture.loose(rng, who, conditions)
        assert (landmarks > 0).all() and (landmarks < image.shape[1::-1]).all()
        grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
        left, right, nose = np.rint(landmarks[:3]).astype(int)
        assert max(grey[left[1], left[0]], grey[right[1], right[0]]) < 0.6 * grey[nose[1], nose[0]]


def test_aligning_a_loose_crop_gives_the_aligned_face():
    difference = collections.defaultdict(list)
    for number in range(3):
        rng, who = person(number)
        conditions = clear(rng, roll=-0.35, pitch=0.1, smile=0.6, noise=0.0, blur=1.0)
        loose, landmarks = capture.loose(rng, who, conditions)
        expected = capture.aligned(who, conditions).astype(float)
        for name, points in (("right", landmarks), ("moved", landmarks + 6.0)):
            matrix = geometry.similarity(points, geometry.STANDARD_POINTS)
            warped = cv2.warpAffine(loose, matrix, (112, 112)).astype(float)
            difference[name].append(np.abs(warped - expected)[20:95, 30:82].mean())  # the face; walls may differ
    assert np.mean(difference["right"]) < min(5, 0.4 * np.mean(difference["moved"]))


def test_jitter_moves_the_aligned_face_by_as_much():
    rng, who = person(1)
    calm = clear(rng, noise=0.0, blur=1.0)
    still = capture.aligned(who, calm).astype(float)
    calm.jitter = np.tile([3.0, -2.0], (5, 1))  # found 3 right of and 2 above where it is: shown 3 left and 2 below
    moved = capture.aligned(who, calm).astype(float)[20:90, 25:85]
    assert np.abs(moved - still[18:88, 28:88]).mean() < 0.3 * np.abs(moved - still[20:90, 25:85]).mean()


def test_conditions_vary_with_the_factor_and_frames_stay_near():
    calm, wild = ([draw_conditions(np.random.default_rng(k), v) for k in range(60)] for v in (0.2, 1.0))
    assert np.std([c.yaw for c in calm]) < 0.5 * np.std([c.yaw for c in wild])
    assert np.mean([c.quality() for c in calm]) > np.mean([c.quality() for c in wild])
    rng = np.random.default_rng(9)
    steps = [abs(next_frame(rng, c).yaw - c.yaw) for c in wild]
    assert 0 < np.mean(steps) < 0.5 * np.std([c.yaw for c in wild])
    assert (next_frame(rng, wild[0]).scenery == wild[0].scenery).all()


@pytest.mark.parametrize("occluder", ["glasses", "sunglasses", "hand", "block"])
def test_occluders_hide_part_of_the_face_only(occluder):
    rng, who = person(2)
    conditions = clear(rng, noise=0.0, occluder_place=(0.4, 0.4))
    without = capture.aligned(who, conditions).astype(int)
    conditions.occluder = occluder
    changed = (np.abs(capture.aligned(who, conditions) - without).max(2) > 8).mean()
    assert 0.01 < changed < 0.6


def test_portrait_keeps_to_its_own_pixels():
    """Canvas sizes that are no multiple of the shadow layer's step."""
    rng, who = person(3)
    portrait = face.Portrait(who, clear(rng))
    matrix = geometry.similarity(portrait.landmarks, geometry.STANDARD_POINTS)
    assert portrait.paint(matrix, 113, 90).shape == (90, 113, 3)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    main(["--root", str(root), *OPTIONS])
    return root


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_training_set(drawn):
    path = drawn / "ms1m-retinaface-t1" / "train.rec"
    with RecordReader(path) as reader:
        header, rest = unpack(reader.read(0))
        assert header.flag == 2 and header.label.tolist() == [9, 4] and not rest
        assert sorted(reader.keys) == list(range(9))
    data = RecordDataset(path)
    assert (data.num_classes, data.num_image, len(data)) == (4, 8, 8)
    assert [data.label(row) for row in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    expected, conditions = next(records.aligned_images(3, records.TRAINING, 0, 1, 1.0))
    jpeg = cv2.imdecode(np.frombuffer(capture.encode(expected, conditions), np.uint8), cv2.IMREAD_COLOR)
    assert (np.asarray(data[0][0]) == jpeg[:, :, ::-1]).all()


def test_verification_set(drawn):
    images, same = read_bin(drawn / "ms1m-retinaface-t1" / "demo.bin")
    assert len(images) == 12 and same.tolist() == [True, False] * 3
    assert cv2.imdecode(np.frombuffer(images[5], np.uint8), cv2.IMREAD_COLOR).shape == (112, 112, 3)
    assert all(a != b for a, b in zip(images[::2], images[1::2]))


def read_csv(path):
    header, *lines = path.read_text().splitlines()
    assert header == "TEMPLATE_ID,SUBJECT_ID,FILENAME"
    return [(int(t), int(s), name) for t, s, name in (line.split(",") for line in lines)]


def test_ijb_set(drawn):
    meta, crops = drawn / "IJBC" / "meta", drawn / "IJBC" / "loose_crop"
    media = [line.split() for line in (meta / "ijbc_face_tid_mid.txt").read_text().splitlines()]
    points = [line.split() for line in (meta / "ijbc_name_5pts_score.txt").read_text().splitlines()]
    names = [row[0] for row in media]
    assert names == [row[0] for row in points] == [f"{k}.jpg" for k in range(1, len(names) + 1)]
    assert set(names) == {p.name for p in crops.iterdir()}
    for name, *numbers in points:
        image = cv2.imread(str(crops / name))
        landmarks = np.array(numbers[:10], float).reshape(5, 2)
        assert len(numbers) == 11 and 0.3 <= float(numbers[10]) < 1
        assert (landmarks > 0).all() and (landmarks < image.shape[1::-1]).all()
    assert len({image.shape for image in map(cv2.imread, map(str, crops.iterdir()))}) > 5

    first, second, probes = (
        read_csv(meta / f"ijbc_1N_{name}.csv") for name in ("gallery_G1", "gallery_G2", "probe_mixed")
    )
    subjects = [{s for _, s, _ in rows} for rows in (first, second, probes)]
    assert subjects[0] & subjects[1] == set() and subjects[0] | subjects[1] == subjects[2] == set(range(1, 7))
    template_of = {name: int(t) for name, t, _ in media}
    assert {name: t for rows in (first, second, probes) for t, _, name in rows} == template_of
    owners = collections.defaultdict(set)
    for _, template, medium in media:
        owners[medium].add(template)
    assert all(len(templates) == 1 for templates in owners.values())
    assert len({t for t, _, _ in probes}) == 12 and len({t for t, _, _ in first + second}) == 6


def test_pair_list_holds_every_pair_once_with_its_label(drawn):
    meta = drawn / "IJBC" / "meta"
    lists = [read_csv(meta / f"ijbc_1N_{name}.csv") for name in ("gallery_G1", "gallery_G2", "probe_mixed")]
    subject = {t: s for rows in lists for t, s, _ in rows}
    probes = {t for t, _, _ in lists[2]}
    lines = (meta / "ijbc_template_pair_label.txt").read_text().splitlines()
    pairs = [tuple(map(int, line.split())) for line in lines]
    expected = {(g, p, int(subject[g] == subject[p])) for g in set(subject) - probes for p in probes}
    assert len(pairs) == len(expected) == 72 and set(pairs) == expected


def test_pair_limit_keeps_the_mated_pairs():
    subjects = {t: t % 4 for t in range(16)}
    galleries, probes = np.arange(4), np.arange(4, 16)
    first, second, same = ijb._pairs(np.random.default_rng(0), galleries, probes, subjects, 20)
    assert len(set(zip(first, second))) == len(first) == 20 and sum(same) == 12
    assert [subjects[a] == subjects[b] for a, b in zip(first, second)] == [bool(s) for s in same]
    assert sum(ijb._pairs(np.random.default_rng(0), galleries, probes, subjects, 5)[2]) == 12


def test_files_do_not_depend_on_the_number_of_processes(drawn, tmp_path):
    main(["--root", str(tmp_path), *OPTIONS[:-1], "2"])
    assert contents(tmp_path) == contents(drawn)


def test_same_options_keep_and_others_redraw(tmp_path, capsys):
    small = [
        "--root",
        str(tmp_path),
        "--identities",
        "2",
        "--images",
        "1",
        "--eval-identities",
        "4",
        "--probes",
        "1",
        "--verification-pairs",
        "2",
        "--processes",
        "1",
    ]
    main(small)
    before = contents(tmp_path)
    marker = tmp_path / "IJBC" / "loose_crop" / "left-over.txt"
    marker.write_text("stays when nothing is drawn")
    main(small)
    assert "kept" in capsys.readouterr().out and marker.exists()
    main([*small, "--seed", "1", "--verification-pairs", "0"])
    after = contents(tmp_path)
    assert not marker.exists() and not (tmp_path / "ms1m-retinaface-t1" / "demo.bin").exists()
    assert after["ms1m-retinaface-t1/train.rec"] != before["ms1m-retinaface-t1/train.rec"]
    main(small)
    assert contents(tmp_path) == before


def test_interrupted_run_is_drawn_again(tmp_path, monkeypatch):
    args = draw_demo_data.parse_arguments(["--root", str(tmp_path), *OPTIONS])

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ijb, "_write_meta", stopped)
        with pytest.raises(KeyboardInterrupt):
            draw_demo_data.draw(args)
    assert not (tmp_path / "IJBC").exists() and not list(tmp_path.rglob("*.tmp"))
    assert json.loads((tmp_path / "demo_data.json").read_text())["complete"] is False
    assert draw_demo_data.draw(args) is True
    assert draw_demo_data.draw(args) is False


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_run_that_is_killed(end):
    """Killed while its workers wait for tasks. They have its standard output open, which ends with the last of them."""
    code = """
import os, signal
from tools.demo_data.draw_demo_data import _workers
with _workers(2) as over:
    list(over(abs, range(16)))
    print("drawn", flush=True)
    signal.pause()
"""
    repo = pathlib.Path(__file__).resolve().parents[2]
    with subprocess.Popen([sys.executable, "-c", code], cwd=repo, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "drawn\n"
        run.send_signal(end)
        assert run.communicate(timeout=60)[0] == "" and run.returncode == -end


def test_files_of_others_are_not_replaced(tmp_path):
    theirs = tmp_path / "ms1m-retinaface-t1" / "train.rec"
    theirs.parent.mkdir()
    theirs.write_bytes(b"five million faces")
    with pytest.raises(SystemExit, match="train.rec .*--root"):
        main(["--root", str(tmp_path), *OPTIONS])
    assert theirs.read_bytes() == b"five million faces" and not (tmp_path / "demo_data.json").exists()


@pytest.mark.parametrize(
    "wrong", [["--identities", "0"], ["--variation", "-1"], ["--variation", "nan"], ["--images", "two"]]
)
def test_wrong_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        main(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_contact_sheet(tmp_path):
    sheet = tmp_path / "docs" / "faces.png"
    main(["--sheet", str(sheet), "--seed", "3"])
    image = cv2.imread(str(sheet))
    rows, columns = draw_demo_data.SHEET_ROWS, draw_demo_data.SHEET_COLUMNS
    assert image.shape == (112 * rows, 112 * columns, 3)
    assert (image[:112, :112] == next(records.aligned_images(3, records.TRAINING, 0, 1, 1.0))[0]).all()
    assert [p.name for p in sheet.parent.iterdir()] == ["faces.png"]
