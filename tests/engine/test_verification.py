import pickle

import cv2
import numpy as np
import pytest
import torch

from engine.verification import THRESHOLDS, VerificationError, Verifier, k_fold_accuracy, read_bin


def png(value):
    return cv2.imencode(".png", np.full((112, 112, 3), value, np.uint8))[1].tobytes()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_reads_every_pickle_protocol(tmp_path, protocol):
    images, same = [png(v) for v in (1, 2, 3, 4)], [True, False]
    path = tmp_path / "set.bin"
    path.write_bytes(pickle.dumps((images, same), protocol=protocol))
    read_images, read_same = read_bin(path)
    assert read_images == images and read_same.tolist() == same


def test_no_code_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    path = tmp_path / "set.bin"
    path.write_bytes(pickle.dumps(([Evil()], [True])))
    with pytest.raises(VerificationError, match="set.bin: not a verification set.*open"):
        read_bin(path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [([b"x"], [True]), ([b"x", "y"], [True]), ([], []), ([b"x", b"y"], [3]), 7])
def test_wrong_content_is_an_error(tmp_path, content):
    path = tmp_path / "set.bin"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(VerificationError, match="set.bin"):
        read_bin(path)


def test_truncated_and_missing(tmp_path):
    path = tmp_path / "set.bin"
    whole = pickle.dumps(([png(0), png(1)], [True]))
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(VerificationError, match="set.bin"):
            read_bin(path)
    with pytest.raises(VerificationError, match="take it out of val_targets"):
        Verifier(tmp_path, ["none"], 2, torch.device("cpu"))


def test_accuracy_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    first = rng.standard_normal((60, 4))
    same = rng.random(60) < 0.5
    second = np.where(same[:, None], first + 0.6 * rng.standard_normal((60, 4)), rng.standard_normal((60, 4)))
    first, second = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second))
    scores = []
    for fold in range(10):
        test = range(fold * 6, fold * 6 + 6)
        def accuracy(pairs, threshold):
            return np.mean([(np.sum((first[i] - second[i]) ** 2) < threshold) == same[i] for i in pairs])
        train = [i for i in range(60) if i not in test]
        best = max(THRESHOLDS, key=lambda threshold: accuracy(train, threshold))
        scores.append(accuracy(test, best))
    assert k_fold_accuracy(first, second, same) == pytest.approx(np.mean(scores))
    assert 0.6 < np.mean(scores) < 1


def test_verifier_uses_both_mirror_images(tmp_path):
    class Net(torch.nn.Module):
        def forward(self, x):
            return x[:, 0, 0, :2] + 2       # depends on the left edge alone

    left = np.zeros((112, 112, 3), np.uint8)
    left[:, 0] = 200
    images = [cv2.imencode(".png", x)[1].tobytes() for x in (left, left[:, ::-1].copy(), left, np.zeros_like(left))]
    (tmp_path / "mirror.bin").write_bytes(pickle.dumps((images, [True, False])))
    verifier = Verifier(tmp_path, ["mirror"], 3, torch.device("cpu"))
    embeddings = verifier._embed(Net(), "mirror", verifier.sets["mirror"][0])
    assert np.allclose(embeddings[0], embeddings[1]) and not np.allclose(embeddings[2], embeddings[3])
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1)


def test_training_mode_comes_back(tmp_path):
    (tmp_path / "set.bin").write_bytes(pickle.dumps(([png(v) for v in range(8)], [True, False, True, False])))
    modes = []

    class Net(torch.nn.Module):
        def forward(self, x):
            modes.append(self.training)
            return x[:, 0, 0, :2]

    net = Net().train()
    assert set(Verifier(tmp_path, ["set"], 3, torch.device("cpu")).run(net)) == {"set"}
    assert net.training and not any(modes)
    assert not Verifier(tmp_path, [], 3, torch.device("cpu"))
