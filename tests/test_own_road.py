"""The README's second road, on drawn people: their photos, a production model from outside, the upgrade, its export.

The production model is no network of this repo: a linear map of the picture's coarse colours, and an answer to fine
noise that differs from image to image of a person. A new model learns the first part and not the second, so its queries
find the right entry of the production model's gallery more often than the production model's own do.
"""

import json
import os
import pathlib
import pickle
import re
import sys

import cv2
import numpy as np
import onnxruntime
import pytest
import torch

from tests.machines import copy_tree
from tests.ranks import run_session
from tests.test_readme import code_blocks, own_commands
from tools.export.export_onnx import traced
from tools.ijbc_eval.align import REFERENCE

PEOPLE, PHOTOS, CORNER = 240, 5, (21, 34)  # of the face in a photo, x and y
NOISE = 12  # of the pixels
SCALE = {
    "network": "tiny",
    "embedding_size": 128,
    "num_epoch": 8,
    "warmup_epoch": 1.0,
    "batch_size": 16,
    "num_workers": 1,
    "lr": 0.05,
    "margin_list": "(1.0,0.0,0.0)",
    "margin_scale": 16.0,
}
PAIRS = "--pairs dataset/mine/pairs.txt dataset/mine"
FOLDERS = "--gallery dataset/mine/gallery --probe dataset/mine/probe"
READ = "--fpr 0.1 --fpir 0.1 --bootstrap 0 --workers 1"


class Production(torch.nn.Module):
    """The model from outside, 64 wide: RGB, (x − 127.5)/127.5."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.coarse = torch.nn.Parameter(1.3 * torch.randn(64, 48, generator=generator) / 48**0.5)
        fine = torch.randn(64, 3, 56, 56, generator=generator).repeat_interleave(2, 2).repeat_interleave(2, 3)
        fine[:, :, ::2] *= -1  # nothing but the highest frequency
        fine[..., ::2] *= -1
        self.fine = torch.nn.Parameter(fine * 127.5 / NOISE / (3 * 112 * 112) ** 0.5)

    def forward(self, images):
        coarse = torch.nn.functional.avg_pool2d(images, 28).flatten(1) @ self.coarse.T
        return coarse + torch.tanh(torch.nn.functional.conv2d(images, self.fine).flatten(1))


def draw_photos(folder):
    """People of five by five coarse colours, of which blue varies most, with a frame around and landmarks in a file."""
    rng, lines = np.random.default_rng(5), []
    for number in range(PEOPLE):
        who = 128 + rng.uniform(-1, 1, (5, 5, 3)) * [90, 50, 25]  # BGR
        (folder / f"person {number:03}").mkdir(parents=True)
        for photo in range(PHOTOS):
            face = cv2.resize((who + rng.normal(0, 6, who.shape)).clip(0, 255).astype(np.float32), (112, 112))
            picture = rng.integers(0, 256, (160, 150, 3)).astype(np.float32)
            (x, y), name = CORNER, f"person {number:03}/{photo}.png"
            picture[y : y + 112, x : x + 112] = face + rng.normal(0, NOISE, face.shape)
            cv2.imwrite(str(folder / name), picture.clip(0, 255).astype(np.uint8))
            lines.append(" ".join([name, *(f"{value:.3f}" for value in (REFERENCE + CORNER).ravel()), "0.99"]))
    return "\n".join(lines) + "\n"


class Road:
    """A copy of the tree, where commands run at this test's scale."""

    def __init__(self, root):
        self.root = root
        copy_tree(root)
        (root / "landmarks.txt").write_text(draw_photos(root / "photos"))
        (root / "old.onnx").write_bytes(traced(Production().eval(), {}))
        (block,) = code_blocks("docs/own_data.md", "python")
        (root / "BCT_methods/MixBCT/configs/mine.py").write_text(block + "config.mix_ratio = 0.7\n")  # few classes
        without = re.sub(r"config.credible_old_feature.*\n", "", block)
        (root / "BCT_methods/L2/configs/mine.py").write_text(f"{without}config.loss_weight = [1, 20]\n")

    def run(self, *commands):
        environment = {
            **os.environ,
            "BCT_OVERRIDES": " ".join(f"--{key} {value}" for key, value in SCALE.items()),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        script = "set -e\n" + "\n".join(commands)
        result = run_session(["bash", "-c", script], cwd=self.root, env=environment)
        assert result.returncode == 0, f"{script}\n{result.stdout[-3000:]}\n{result.stderr[-5000:]}"
        return result.stdout

    def report(self, models, sets, old="old.onnx"):
        """`(figures of the old self-test, {name: a model's part of report.json})` of the models {name: file}."""
        news = " ".join(f"--new {name}={file}" for name, file in models.items())
        self.run(f"python tools/ijbc_eval/compat_report.py --old {old} {news} {sets} {READ} --out report")
        report = json.loads((self.root / "report/report.json").read_text())
        return report["old"]["self"], {model["name"]: model for model in report["new"]}


def at_scale(command):
    command = command.replace("--nproc_per_node=8", "--nproc_per_node=2").replace("--val 0.1", "--val 0.2")
    command = re.sub(r"(?<=net )r50|(?<=\.pt:)r50", "tiny", command)
    return f"{command} {READ}" if "compat_report" in command else command


def train_l2(features, output):
    files = f"--old_embedding {features}_feature.npy --old_embedding_label {features}_label.npy"
    return f"python BCT_methods/L2/train.py BCT_methods/L2/configs/mine.py --batch_size 32 --output {output} {files}"


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """The README's commands, as they stand, then L2 beside MixBCT."""
    road = Road(tmp_path_factory.mktemp("own") / "repo")
    road.printed = road.run(*map(at_scale, own_commands()))
    road.run(train_l2("feature_save/EXclass/production_class100", "work_dirs/L2"))
    return road


MODELS = {"MixBCT": "work_dirs/mine/model.pt:tiny", "L2": "work_dirs/L2/model.pt:tiny"}


def test_new_queries_find_the_old_entries_better_than_old_queries(road):
    assert "960 images, 192 classes; held out 48 people" in road.printed and "smallest cosine 1.0000" in road.printed
    old, new = road.report(MODELS, PAIRS)
    assert {name: model["compatible"] for name, model in new.items()} == {"MixBCT": "yes", "L2": "yes"}
    assert all(model["self"]["tpr"] > model["cross"]["tpr"] > old["tpr"] + 0.05 for model in new.values())
    old, new = road.report(MODELS, FOLDERS)
    assert all(model["self"]["top1"] > model["cross"]["top1"] > old["top1"] for model in new.values())


@pytest.mark.parametrize("wrong", ["--bgr", "--mean 0 --std 255"])
def test_old_features_of_a_wrong_call_end_below_the_criterion(road, wrong):
    name = wrong.split()[0].strip("-")
    extract = f"python tools/get_feature/get_feature.py --model old.onnx {wrong} --rec dataset/mine/train.rec"
    train = train_l2(f"feature_save/EXclass/{name}_class100", f"work_dirs/{name}")
    road.run(f"{extract} --SD {name}_class100", train)
    old, new = road.report({name: f"work_dirs/{name}/model.pt:tiny"}, PAIRS)
    assert new[name]["compatible"] == "no" and new[name]["cross"]["tpr"] < old["tpr"] - 0.05


def test_the_exported_model_gives_the_same_table(road):
    _, new = road.report({"MixBCT": MODELS["MixBCT"], "exported": "new.onnx"}, f"{PAIRS} {FOLDERS}")
    for test in ("self", "cross"):
        for key in ("tpr", "auc", "tpir", "top1"):
            assert new["exported"][test][key] == pytest.approx(new["MixBCT"][test][key], abs=2e-3)


def test_stored_features_and_a_bin_file_give_the_same_table(road):
    mine = road.root / "dataset/mine"
    pairs = [line.split("\t") for line in (mine / "pairs.txt").read_text().splitlines()]
    names = sorted({name for *both, _ in pairs for name in both})
    session = onnxruntime.InferenceSession(str(road.root / "old.onnx"), providers=["CPUExecutionProvider"])
    images = np.stack([cv2.imread(str(mine / name))[:, :, ::-1] for name in names]).transpose(0, 3, 1, 2)
    images = (images.astype(np.float32) - 127.5) / 127.5
    views = images, images[..., ::-1]  # mirrored, too, as in the evaluation
    rows = sum(session.run(None, {"images": one})[0] for one in views)
    np.save(road.root / "gallery.npy", rows)
    (road.root / "gallery.txt").write_text("\n".join(names) + "\n")
    encoded = [(mine / name).read_bytes() for *both, _ in pairs for name in both]
    (road.root / "mine.bin").write_bytes(pickle.dumps((encoded, [same == "1" for *_, same in pairs])))

    expected = road.report(MODELS, PAIRS)
    for found in (
        road.report(MODELS, f"{PAIRS} --old_labels gallery.txt", old="gallery.npy"),
        road.report(MODELS, "--bin mine.bin"),
    ):
        for key in ("tpr", "auc"):
            assert found[0][key] == pytest.approx(expected[0][key], abs=2e-3)
            for name in MODELS:
                assert found[1][name]["cross"][key] == pytest.approx(expected[1][name]["cross"][key], abs=2e-3)
