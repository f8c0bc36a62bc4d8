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
