import pickle

import cv2
import numpy as np
import pytest
import torch
from sklearn.model_selection import KFold

from engine.verification import THRESHOLDS, VerificationError, Verifier, k_fold_accuracy


def png(value):
    return cv2.imencode(".png", np.full((112, 112, 3), value, np.uint8))[1].tobytes()


def write_set(path, images, same):
    path.write_bytes(pickle.dumps((images, same)))
    return path


def test_a_missing_set_is_an_error_before_training(tmp_path):
    with pytest.raises(VerificationError, match=r"none\.bin: .* remove it from val_targets"):
        Verifier(tmp_path, ["none"], 2, torch.device("cpu"))


WHOLE = {
    kind: cv2.imencode(kind, np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8))[1].tobytes()
    for kind in (".png", ".jpg", ".bmp")
}


@pytest.mark.parametrize(
    "image, why",
    [
        (cv2.imencode(".png", np.zeros((113, 112, 3), np.uint8))[1].tobytes(), "112 x 113, not 112 x 112"),
        (cv2.imencode(".jpg", np.zeros((250, 251, 3), np.uint8))[1].tobytes(), "251 x 250, not 112 x 112"),
        (b"", "0 bytes that do not decode"),
        (b"no image", "8 bytes that do not decode"),
        (WHOLE[".bmp"], "a BMP image; only JPEG and PNG are read"),
        (WHOLE[".jpg"][: len(WHOLE[".jpg"]) // 2], "bytes that do not decode"),
        (WHOLE[".png"][: len(WHOLE[".png"]) // 2], "bytes that do not decode"),
        (WHOLE[".png"][:50] + WHOLE[".png"][90:], "bytes that do not decode"),  # damaged inside
    ],
)
def test_an_image_that_cannot_be_verified_is_named_before_training(tmp_path, image, why):
    write_set(tmp_path / "set.bin", [png(0), png(1), png(2), image], [True, False])
    with pytest.raises(VerificationError, match=rf"set\.bin: image 3: .*{why}"):
        Verifier(tmp_path, ["set"], 2, torch.device("cpu"))


def test_one_pair_is_refused_before_training(tmp_path):
    write_set(tmp_path / "set.bin", [png(0), png(1)], [True])
    with pytest.raises(VerificationError, match=r"set\.bin: one pair; .* needs two or more"):
        Verifier(tmp_path, ["set"], 2, torch.device("cpu"))


def test_embeddings_that_are_not_finite_have_no_accuracy():
    rows = np.ones((4, 2), np.float32)
    assert k_fold_accuracy(rows, rows, np.array([True] * 4)) == 1
    rows[2, 1] = np.nan
    assert np.isnan(k_fold_accuracy(rows, np.ones((4, 2)), np.array([True] * 4)))


@pytest.mark.parametrize("pairs", [60, 63, 7])
def test_accuracy_equals_a_plain_loop_over_sklearns_folds(pairs):
    rng = np.random.default_rng(0)
    first = rng.standard_normal((pairs, 4))
    same = rng.random(pairs) < 0.5
    second = np.where(same[:, None], first + 0.6 * rng.standard_normal((pairs, 4)), rng.standard_normal((pairs, 4)))
    first, second = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second))

    def accuracy(rows, threshold):
        return np.mean([(np.sum((first[i] - second[i]) ** 2) < threshold) == same[i] for i in rows])

    scores = []
    for train, test in KFold(min(10, pairs)).split(same):
        best = max(THRESHOLDS, key=lambda threshold: accuracy(train, threshold))
        scores.append(accuracy(test, best))
    assert k_fold_accuracy(first, second, same) == pytest.approx(np.mean(scores))
    assert 0.5 < np.mean(scores) < 1


def test_verifier_uses_both_mirror_images(tmp_path):
    class Net(torch.nn.Module):
        def forward(self, x):
            return x[:, 0, 0, :2] + 2  # depends on the left edge alone

    left = np.zeros((112, 112, 3), np.uint8)
    left[:, 0] = 200
    images = [cv2.imencode(".png", x)[1].tobytes() for x in (left, left[:, ::-1].copy(), left, np.zeros_like(left))]
    (tmp_path / "mirror.bin").write_bytes(pickle.dumps((images, [True, False])))
    verifier = Verifier(tmp_path, ["mirror"], 3, torch.device("cpu"))
    embeddings = verifier._embed(Net(), "mirror", verifier.sets["mirror"][0])
    assert np.allclose(embeddings[0], embeddings[1]) and not np.allclose(embeddings[2], embeddings[3])
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1)


class Corner(torch.nn.Module):
    """The angle of the upper left pixel's red and green, turned by `degrees`."""

    num_features = 2

    def __init__(self, degrees):
        super().__init__()
        cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        self.turn = torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float32)

    def forward(self, x):
        return (x[:, :2, 0, 0] + 1) @ self.turn


class Wider(Corner):
    def forward(self, x):
        return torch.nn.functional.pad(super().forward(x), (0, 1), value=0.7)


def test_a_cross_test_has_the_old_model_on_first_images(tmp_path):
    """Pairs of one person are 10 degrees apart, of two -40; a new model that is turned by 40 makes them 50 and 0."""
    degrees = [(20, 30, True), (60, 20, False), (40, 50, True), (70, 30, False), (10, 20, True), (80, 40, False)]

    def draw(angle):
        image = np.zeros((112, 112, 3), np.uint8)
        image[..., 2], image[..., 1] = 200 * np.cos(np.deg2rad(angle)), 200 * np.sin(np.deg2rad(angle))  # BGR
        return cv2.imencode(".png", image)[1].tobytes()

    images = [draw(angle) for pair in degrees for angle in pair[:2]]
    write_set(tmp_path / "set.bin", images, [same for *_, same in degrees])
    verifier = Verifier(tmp_path, ["set"], 4, torch.device("cpu"), old=Corner(0))
    assert verifier.old_accuracies == {"set": 1.0}
    # No threshold parts 0 from 50 the right way round: each fold takes what suits the majority of the other five.
    assert verifier.run(Corner(40)) == {"self": {"set": 1.0}, "cross": {"set": 0.0}}
    assert verifier.run(Corner(0)) == {"self": {"set": 1.0}, "cross": {"set": 1.0}}
    assert Verifier(tmp_path, ["set"], 4, torch.device("cpu")).run(Corner(40)) == {"self": {"set": 1.0}}
    # Of a wider new model the first coordinates meet the old ones; its self-test has all three.
    assert verifier.run(Wider(40)) == {"self": {"set": 1.0}, "cross": {"set": 0.0}}
    assert verifier.run(Wider(0)) == {"self": {"set": 1.0}, "cross": {"set": 1.0}}


def test_training_mode_is_restored(tmp_path):
    (tmp_path / "set.bin").write_bytes(pickle.dumps(([png(v) for v in range(8)], [True, False, True, False])))
    modes = []

    class Net(torch.nn.Module):
        def forward(self, x):
            modes.append(self.training)
            return x[:, 0, 0, :2]

    net = Net().train()
    assert set(Verifier(tmp_path, ["set"], 3, torch.device("cpu")).run(net)["self"]) == {"set"}
    assert net.training and not any(modes)
    assert not Verifier(tmp_path, [], 3, torch.device("cpu"))
