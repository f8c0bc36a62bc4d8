"""The old side as stored features: the figures of the model that made them, what rounding costs, wrong files."""

import json
import re

import numpy as np
import pytest

from core.errors import UserError
from core.files import atomic_write
from core.manifest import digest, write_manifest
from tools.ijbc_eval import compat_report, ijbc_eval
from tools.ijbc_eval.images import Crops
from tools.ijbc_eval.stored import StoredFeatures, cosines, open_stored

GALLERY = {"Ann": [10, 30], "Bob": [60], "Cy": [110]}
PROBES = {"Ann": [33, 12], "Bob": [72, 92], "Cy": [112], "Dora": [150, 78, 20]}


def unit(degrees):
    angle = np.deg2rad(np.array(degrees, float))
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


@pytest.fixture
def drawn(tmp_path, draw_crop):
    """The folders, and files of the old features of all images: their names, float32, float16, int8 and its scale."""
    names, degrees = [], []
    for side, people in (("gallery", GALLERY), ("probe", PROBES)):
        for person, values in people.items():
            for number, value in enumerate(values):
                names.append(f"{side}/{person}/{number}.png")
                degrees.append(value)
                draw_crop(tmp_path / names[-1], value)
    rows, scale = 3 * unit(degrees), np.array([0.03, 0.04], np.float32)
    save(tmp_path, names, f32=rows, f16=rows.astype(np.float16), q=np.rint(rows / scale).astype(np.int8), scale=scale)
    pairs = [f"gallery/Ann/{a}.png\tprobe/Ann/{b}.png\t1" for a, b in ("00", "01", "11")]
    pairs += [f"gallery/Bob/0.png\tprobe/{other}.png\t0" for other in ("Ann/0", "Cy/0", "Dora/1", "Dora/2")]
    (tmp_path / "pairs.txt").write_text("\n".join(pairs) + "\n")
    return tmp_path


def save(folder, names, **arrays):
    (folder / "names.txt").write_text("".join(f"{name}\n" for name in names))
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


@pytest.fixture
def evaluate(drawn, degree_models):
    models = degree_models(old=0, new=7)

    def run(*words, sets=("pairs",)):
        given = {
            "pairs": ["--pairs", drawn / "pairs.txt", drawn],
            "folders": ["--gallery", drawn / "gallery", "--probe", drawn / "probe"],
        }
        words = [*words, *(word for name in sets for word in given[name])]
        ijbc_eval.main(["-m", models["new"], "--workers", "0", "-R", str(drawn / "r.npz"), *map(str, words)])
        with np.load(drawn / "r.npz") as saved:
            return {key: saved[key] for key in saved.files}

    run.models = models
    return run


@pytest.mark.parametrize("sets", [["pairs"], ["folders"]])
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_the_figures_are_those_of_the_model(evaluate, drawn, kind, sets):
    by_model = evaluate("-m_old", evaluate.models["old"], sets=sets)
    stored = evaluate("-m_old", drawn / f"{kind}.npy", "--old_labels", drawn / "names.txt", sets=sets)
    np.testing.assert_allclose(stored["scores"], by_model["scores"], atol=1e-6 if kind == "f32" else 1e-3)
    assert str(stored["models"]) != str(by_model["models"])


def test_int8_is_multiplied_by_its_scale_and_its_loss_is_told(evaluate, drawn, capsys):
    words = ["-m_old", drawn / "q.npy", "--old_labels", drawn / "names.txt", "--old_scale", drawn / "scale.npy"]
    found = evaluate(*words, "--old_float32", drawn / "f32.npy")
    rows, exact = (np.load(drawn / "q.npy") * np.array([0.03, 0.04])), np.load(drawn / "f32.npy")
    by_hand = (rows * exact).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(exact, axis=1)
    said = re.search(r"q\.npy: int8, cosine to float32: mean (\S+), lowest (\S+)", capsys.readouterr().out)
    assert [float(text) for text in said.groups()] == pytest.approx([by_hand.mean(), by_hand.min()], abs=2e-6)
    assert by_hand.min() < 0.99999
    assert found["names"].tolist() == ["new_to_q", "new_to_q float32"]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert found["scores"][0][0] == pytest.approx(rows[0] @ unit([33 + 7])[0], abs=1e-6)
    assert found["scores"][1][0] == pytest.approx(np.cos(np.deg2rad(30)), abs=1e-6)
    model = evaluate(*words, "--old_float32", evaluate.models["old"])  # the original may be the model
    np.testing.assert_allclose(model["scores"], found["scores"], atol=1e-6)


@pytest.mark.parametrize("scale", [0.5, np.array([0.5, 2.0]), np.array([[1.0], [2.0], [4.0]])])
def test_a_scale_for_all_for_dimensions_or_for_rows(tmp_path, scale):
    rows = np.array([[1, 2], [-3, 4], [5, -6]], np.int8)
    save(tmp_path, "abc", q=rows, scale=np.float32(scale))
    given = str(scale) if isinstance(scale, float) else str(tmp_path / "scale.npy")
    found = open_stored(tmp_path / "q.npy", tmp_path / "names.txt", given)
    np.testing.assert_array_equal(found.rows, rows * np.float32(scale))


def test_a_gallery_that_exists_only_as_features_of_people(evaluate, drawn, capsys):
    people = [person for person, values in GALLERY.items() for _ in values]
    save(drawn, people, g=np.load(drawn / "f32.npy")[:4])
    (drawn / "people.txt").write_text("".join(f"{person}\n" for person in people))
    by_images = evaluate("-m_old", evaluate.models["old"], sets=["folders"])
    words = ["-m_old", drawn / "g.npy", "--old_labels", drawn / "people.txt", "--probe", drawn / "probe", "-L"]
    found = evaluate(*words, sets=[])
    for key in ("rank", "label", "tpirs", "top_rates"):
        np.testing.assert_array_equal(found[key], by_images[key])
    np.testing.assert_allclose(found["scores"], by_images["scores"], atol=1e-6)
    assert found["gallery_gallery_template"].tolist() == [0, 1, 2, 3]
    np.save(drawn / "people.npy", np.array(people))
    again = evaluate(*words[:3], drawn / "people.npy", *words[4:], sets=[])
    np.testing.assert_array_equal(again["scores"], found["scores"])
    with pytest.raises(UserError, match="--probe without --gallery: a report has M"):
        old = ["--old", str(drawn / "g.npy"), "--old_labels", str(drawn / "people.txt")]
        compat_report.main([*old, "--new", evaluate.models["new"], "--probe", str(drawn / "probe")])


def test_a_report_without_the_old_model(evaluate, drawn, capsys):
    def report(*old):
        sets = ["--pairs", drawn / "pairs.txt", drawn, "--gallery", drawn / "gallery", "--probe", drawn / "probe"]
        words = ["--new", f"N={evaluate.models['new']}", "--workers", 0, "--bootstrap", 20, "--out", drawn / "out"]
        compat_report.main([str(word) for word in ["--old", *old, *sets, *words]])
        return json.loads((drawn / "out" / "report.json").read_text())

    by_model = report(evaluate.models["old"])
    stored = report(drawn / "f32.npy", "--old_labels", drawn / "names.txt")
    assert stored["new"][0]["cross"]["tpir"] == by_model["new"][0]["cross"]["tpir"]
    assert stored["new"][0]["criterion"] == by_model["new"][0]["criterion"]
    assert stored["old"]["self"]["tpr_at"] == by_model["old"]["self"]["tpr_at"] and stored["old"]["name"] == "f32"
    old = [drawn / "q.npy", "--old_labels", drawn / "names.txt", "--old_scale", "0.03"]  # wrong in one dimension
    lossy = report(*old, "--old_float32", drawn / "f32.npy")
    exact = stored["new"][0]["cross"]["tpir"]
    lost = lossy["stored"]["minus_float32"]["N cross-test"]["tpir"]
    assert lost == pytest.approx(lossy["new"][0]["cross"]["tpir"] - exact)
    shown = " ".join((drawn / "out" / "report.md").read_text().split())
    assert "is int8: cosine to float32" in shown and "old self-test 1:1 TPR" in shown
    assert lossy["stored"]["lowest"] < 0.999


def test_features_of_the_gallery_alone_do_for_a_cross_test(evaluate, drawn):
    names = (drawn / "names.txt").read_text().split()
    save(drawn, names[:4], some=np.load(drawn / "f32.npy")[:4])
    words = ["-m_old", drawn / "some.npy", "--old_labels", drawn / "names.txt"]
    for sets in (["pairs"], ["folders"]):
        np.testing.assert_allclose(
            evaluate(*words, sets=sets)["scores"],
            evaluate("-m_old", evaluate.models["old"], sets=sets)["scores"],
            atol=1e-6,
        )
    with pytest.raises(UserError, match=r"some\.npy: no row for probe/Ann/0\.png and 7 more, needed as .* for M\(old"):
        old = ["--old", str(drawn / "some.npy"), "--old_labels", str(drawn / "names.txt"), "--workers", "0"]
        sets = ["--gallery", str(drawn / "gallery"), "--probe", str(drawn / "probe")]
        compat_report.main([*old, "--new", evaluate.models["new"], *sets])
    save(drawn, names[1:4], some=np.load(drawn / "f32.npy")[1:4])
    with pytest.raises(UserError, match=r"some\.npy: no row for gallery/Ann/0\.png and 0 more, needed as an entry"):
        evaluate(*words, sets=["folders"])


def test_shuffled_rows_with_their_labels_change_nothing(evaluate, drawn):
    words = ["-m_old", drawn / "f32.npy", "--old_labels", drawn / "names.txt"]
    before, names = evaluate(*words)["scores"], np.array((drawn / "names.txt").read_text().split())
    order = np.random.default_rng(3).permutation(len(names))
    save(drawn, names[order], f32=np.load(drawn / "f32.npy")[order])
    np.testing.assert_array_equal(evaluate(*words)["scores"], before)
    save(drawn, names, f32=np.load(drawn / "f32.npy"))  # the labels put back, the features not
    assert not np.allclose(evaluate(*words)["scores"], before, atol=0.01)


ROWS = np.ones((3, 2), np.float32)


@pytest.mark.parametrize(
    "array, scale, message",
    [
        (ROWS.astype(np.int8), None, r"f\.npy: int8 features need --old_scale: a number, or an \.npy"),
        (ROWS, "0.1", r"f\.npy: --old_scale is for int8, not float32"),
        (ROWS.astype(np.int8), "0", r"--old_scale 0: cannot|--old_scale 0: .*no such file|^0: no such file"),
        (ROWS.astype(np.int8), np.ones(3, np.float32), r"scale\.npy: float32 \[3\]; .* one float, \[2\] or \[3, 1\]"),
        (ROWS.astype(np.int8), np.array([1, np.nan], np.float32), r"scale\.npy: must be finite and above 0"),
        (
            ROWS.astype(np.int8),
            np.array([1, 2]),
            r"scale\.npy: int64 \[2\]; for features \[3, 2\] it must be one float",
        ),
        (ROWS.astype(np.int32), None, r"f\.npy: int32 \[3, 2\]; stored features are float32, float16 or int8"),
        (ROWS[0], None, r"f\.npy: float32 \[2\]; stored features are"),
        (ROWS * np.array([[1], [np.inf], [1]], np.float32), None, r"f\.npy: row 1 is not finite, or only zeros"),
        (ROWS * np.array([[1], [1], [0]], np.float32), None, r"f\.npy: row 2 is not finite, or only zeros"),
        (ROWS[:2], None, r"--old_labels .*names\.txt: 3 labels, but .*f\.npy has 2 rows; give one a row"),
    ],
)
def test_wrong_features(tmp_path, array, scale, message):
    save(tmp_path, "abc", f=array)
    if isinstance(scale, np.ndarray):
        np.save(tmp_path / "scale.npy", scale)
        scale = str(tmp_path / "scale.npy")
    with pytest.raises(UserError, match=message):
        open_stored(tmp_path / "f.npy", tmp_path / "names.txt", scale)


def test_wrong_files(tmp_path):
    save(tmp_path, "aba", f=ROWS)
    path = tmp_path / "f.npy"
    with pytest.raises(UserError, match=r"f\.npy: stored features need --old_labels"):
        open_stored(path, None)
    with pytest.raises(UserError, match=r"--old_labels .*none: cannot be read \(.*No such file"):
        open_stored(path, tmp_path / "none")
    with pytest.raises(UserError, match=r"none\.npy: no such file; check the path"):
        open_stored(tmp_path / "none.npy", tmp_path / "names.txt")
    with pytest.raises(UserError, match=r"--old_labels .*: a is the label of two rows; keep one"):
        open_stored(path, tmp_path / "names.txt").of_images(Crops(tmp_path, np.array(["a", "b"])))
    (tmp_path / "names.txt").write_text("x\ny\nz\n")
    with pytest.raises(UserError, match=r"x and the others are no images of the set, whose first is a; give names"):
        open_stored(path, tmp_path / "names.txt").of_images(Crops(tmp_path, np.array(["a", "b"])))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"f\.npy: cannot be read as an \.npy file \(.*; write it again"):
        open_stored(path, tmp_path / "names.txt")


def test_options_of_stored_features_alone(evaluate, drawn):
    for option in ("--old_labels", "--old_scale", "--old_float32"):
        with pytest.raises(UserError, match=f"{option}: is for stored features, an .npy file, not for the model"):
            evaluate("-m_old", evaluate.models["old"], option, "x")
    save(drawn, "ab", two=ROWS[:2])
    (drawn / "abc.txt").write_text("a\nb\nc\n")
    np.save(drawn / "three.npy", ROWS)
    with pytest.raises(UserError, match=r"two\.npy has 2 rows; give one a row"):
        words = ["-m_old", drawn / "three.npy", "--old_labels", drawn / "abc.txt", "--old_float32", drawn / "two.npy"]
        evaluate(*words)


def test_a_manifest_says_whose_the_features_are(tmp_path, capsys):
    (tmp_path / "old.pt").write_text("old")
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    with atomic_write(tmp_path / "f.npy") as file:
        np.save(file, ROWS)
        write_manifest(tmp_path / "f.npy", file, "features", model=digest(tmp_path / "old.pt"))
    stored = open_stored(tmp_path / "f.npy", tmp_path / "names.txt")
    assert stored.identity == digest(tmp_path / "old.pt")
    assert StoredFeatures(str(tmp_path / "other.npy"), None).identity is None
    np.save(tmp_path / "f.npy", 2 * ROWS)
    with pytest.raises(UserError, match=r"f\.npy: has changed since f\.npy\.json was written"):
        open_stored(tmp_path / "f.npy", tmp_path / "names.txt")


def test_cosines_by_hand():
    rows = np.array([[1, 0], [0.6, 0.8], [0, 0], [0, 1]], np.float32)
    exact = np.array([[1, 0], [1, 0], [1, 0], [0, 0]], np.float32)
    assert cosines(rows, exact) == pytest.approx((0.8, 0.6))  # of the first two: zeros are rows that are not there
