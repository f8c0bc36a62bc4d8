"""get_feature without a config: models from outside, stored features, images that have none."""

import numpy as np
import pytest
import torch

import backbones
from BCT_methods.L2.train import L2
from core.config import load_config
from core.files import atomic_write
from core.manifest import digest, read_manifest, write_manifest
from dataset import RecordDataset
from old_model.feature_set import FeatureSet
from tests.BCT_methods.whole_runs import REPO
from tests.conftest import draw_record_set
from tests.tools.test_get_feature import refused
from tools.get_feature import get_feature

LABELS = [0, 1, 1, 2, 0, 2, 2]


@pytest.fixture
def place(tmp_path):
    """A record set with images.txt, and a model from outside, 8 wide; returns the directory."""
    rec = draw_record_set(tmp_path / "train.rec", LABELS)
    with atomic_write(tmp_path / "images.txt") as file:
        file.write("".join(f"person{label}/{row}.jpg\n" for row, label in enumerate(LABELS)).encode())
        write_manifest(tmp_path / "images.txt", file, "image paths", records=RecordDataset(rec).digest())
    torch.manual_seed(0)
    torch.save(backbones.get_model("tiny", num_features=8).state_dict(), tmp_path / "m.pt")
    return tmp_path


def run(place, *options, name="prod"):
    """Run get_feature on the record set; returns the features."""
    get_feature.main(
        [str(word) for word in ("--SD", name, "--rec", place, "--workspace", place, "--num_workers", 0, *options)]
    )
    files = FeatureSet(name, place / "feature_save")
    assert np.array_equal(np.load(files.label), LABELS)
    return np.load(files.feature)


def features_by_hand(place, mean=127.5, std=127.5, bgr=False):
    model, data = backbones.load_backbone(place / "m.pt", "tiny"), RecordDataset(place / "train.rec")
    images = torch.stack([data[row][0] for row in range(len(data))]).float()
    images = images.flip(3) if bgr else images
    with torch.no_grad():
        return model(((images - mean) / std).permute(0, 3, 1, 2)).numpy()


WAYS = {
    "usual": ({}, []),
    "bgr": ({"bgr": True}, ["--bgr"]),
    "scaled": ({"mean": 0.0, "std": 255.0}, ["--mean", "0", "--std", "255"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_gets_what_the_options_say(way, place, capsys):
    by_hand, options = WAYS[way]
    found = run(place, "--model", place / "m.pt", "--network", "tiny", *options)
    np.testing.assert_allclose(found, features_by_hand(place, **by_hand), atol=1e-5)
    for other, _ in WAYS.values():
        assert (other == by_hand) == np.allclose(found, features_by_hand(place, **other), atol=1e-4)
    manifest = read_manifest(FeatureSet("prod", place / "feature_save").feature)
    order = "BGR" if way == "bgr" else "RGB"
    scaling = "(x - 0) / 255" if way == "scaled" else "(x - 127.5) / 127.5"
    assert manifest["preprocessing"] == f"{order} {scaling}" and manifest["model"] == digest(place / "m.pt")
    assert (manifest["width"], manifest["rows"], manifest["network"]) == (8, 7, "tiny")


def test_another_preprocessing_is_extracted_again_and_the_same_is_kept(place, capsys):
    first = run(place, "--model", place / "m.pt")
    assert np.array_equal(run(place, "--model", place / "m.pt"), first)
    assert "kept, it is of" in capsys.readouterr().out
    assert np.abs(run(place, "--model", place / "m.pt", "--bgr") - first).max() > 1e-3
    assert "made with preprocessing = RGB" in capsys.readouterr().out


def test_onnx(place):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("GlobalAveragePool", ["x"], ["mean"]), helper.make_node("Flatten", ["mean"], ["y"])],
        "means",
        [helper.make_tensor_value_info("x", kind, ["N", 3, 112, 112])],
        [helper.make_tensor_value_info("y", kind, ["N", 3])],
    )
    opset = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), str(place / "m.onnx"))
    data = RecordDataset(place / "train.rec")
    means = np.stack([data[row][0].double().numpy().mean(axis=(0, 1)) for row in range(len(data))])
    found = run(place, "--model", place / "m.onnx")
    np.testing.assert_allclose(found, (means - 127.5) / 127.5, atol=1e-5)
    bgr = run(place, "--model", place / "m.onnx", "--bgr", "--mean", "100", "--std", "50")
    np.testing.assert_allclose(bgr, ((means - 100) / 50)[:, ::-1], atol=1e-5)


def stored(place, rows, lines, dtype=np.float32):
    np.save(place / "f.npy", np.asarray(rows, dtype))
    (place / "p.txt").write_text("".join(f"{line}\n" for line in lines))
    return "--features", place / "f.npy", "--paths", place / "p.txt"


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(size=(len(LABELS), 5)).astype(np.float32)


def paths():
    return [f"person{label}/{row}.jpg" for row, label in enumerate(LABELS)]


def test_shuffling_features_and_paths_together_changes_nothing(place, rows, capsys):
    found = run(place, *stored(place, rows, paths()))
    assert found.dtype == np.float32 and np.array_equal(found, rows)
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = run(place, *stored(place, rows[order], [paths()[row] for row in order]))
    assert np.array_equal(shuffled, rows)
    assert not np.array_equal(run(place, *stored(place, rows[order], paths())), rows)
    length = np.linalg.norm(rows, axis=1)
    assert f"median {np.median(length):.4g}, from {length.min():.4g} to {length.max():.4g}" in capsys.readouterr().out


def test_images_without_a_feature_and_features_of_other_images(place, rows, capsys):
    kept = [6, 2, 0]
    found = run(place, *stored(place, [*rows[kept], rows[1]], [*(f"./{paths()[row]}" for row in kept), "else/9.jpg"]))
    assert np.array_equal(found[kept], rows[kept])
    assert not found[[1, 3, 4, 5]].any()
    said = capsys.readouterr().out
    assert "1 of 4 rows of" in said and "4 of 7 images have no feature" in said
    assert read_manifest(FeatureSet("prod", place / "feature_save").feature)["without_feature"] == 4


def test_labels_say_that_rows_are_in_record_order(place, rows, capsys):
    np.save(place / "l.npy", np.array(LABELS))
    np.save(place / "f.npy", rows.astype(np.float16))
    options = "--features", place / "f.npy", "--labels", place / "l.npy"
    assert np.array_equal(run(place, *options), rows.astype(np.float16).astype(np.float32))
    np.save(place / "l.npy", np.roll(LABELS, 1))
    common = ("--SD", "prod", "--rec", place, "--workspace", place)
    assert "--labels" in (error := refused(capsys, get_feature, *options, *common)) and "row 0 is of class 2" in error
    np.save(place / "f.npy", rows[:-1])
    assert "f.npy: 6 rows, but" in refused(capsys, get_feature, *options, *common)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows, lines: (rows, lines[:-1]), "6 lines, but"),
        (lambda rows, lines: (rows, [lines[3], *lines[1:]]), "lines 1 and 4 are the same path"),
        (lambda rows, lines: (rows, [f"/data/{line}" for line in lines]), "whose first is 'person0/0.jpg'"),
        (lambda rows, lines: (np.where(np.arange(7)[:, None] == 2, np.nan, rows), lines), "row 2 is not finite"),
        (lambda rows, lines: (0 * rows, lines), "all rows are zero"),
        (lambda rows, lines: (rows, lines, np.int8), "int8 [7, 5], expected 2-D floating; give an .npy of float16"),
    ],
)
def test_stored_features_that_do_not_fit(change, message, place, rows, capsys):
    options = stored(place, *change(rows, paths()))
    assert message in refused(capsys, get_feature, *options, "--SD", "prod", "--rec", place, "--workspace", place)
    assert not list((place / "feature_save").rglob("*.npy"))


def test_images_txt_of_another_record_set_is_refused(place, rows, capsys):
    draw_record_set(place / "train.rec", LABELS, seed=1)
    options = stored(place, rows, paths())
    error = refused(capsys, get_feature, *options, "--SD", "prod", "--rec", place, "--workspace", place)
    assert "images.txt: made from another record set" in error and "folder_to_rec.py" in error


def test_files_that_are_not_there(place, rows, capsys):
    options, common = stored(place, rows, paths()), ("--SD", "prod", "--rec", place, "--workspace", place)
    (place / "images.txt").unlink()
    assert "which folder_to_rec.py writes; for another" in refused(capsys, get_feature, *options, *common)
    (place / "f.npy").unlink()
    error = refused(capsys, get_feature, *options, *common)
    assert "--features" in error and "f.npy: no such file; give an .npy of" in error and "write it" not in error


def test_which_images_must_be_said(place, capsys):
    error = refused(capsys, get_feature, "--model", place / "m.pt", "--SD", "prod")
    assert "names none of the sets" in error and "--rec FILE or --scenario NAME" in error
    assert "one of the three" in refused(capsys, get_feature, "--SD", "f8_class70")
    both = ("--model", place / "m.pt", "--features", place / "f.npy")
    assert "one of the three" in refused(capsys, get_feature, *both, "--SD", "prod", "--rec", place)
    assert "give --labels or --paths" in refused(capsys, get_feature, *both[2:], "--SD", "prod", "--rec", place)


def test_a_run_reads_features_of_any_name(place, rows):
    """The new model is wider than the old one, which never saw two of the images."""
    run(place, *stored(place, rows[:5], paths()[:5]))
    files = FeatureSet("prod", place / "feature_save")
    keys = {"scenario": "OPclass_softmax_f128", "workspace": place, "rec": place, "embedding_size": 8}
    keys |= {"network": "tiny", "batch_size": 3, "num_workers": 0, "num_epoch": 1}
    keys |= {"old_model_path": "", "old_embedding": files.feature, "old_embedding_label": files.label}
    base = REPO / "BCT_methods/L2/configs/base.py"
    trainer = L2(load_config(base, [str(word) for key, value in keys.items() for word in (f"--{key}", value)]))
    trainer.train()
    assert trainer.step == 2 and trainer.old.width == 5
