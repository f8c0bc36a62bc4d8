"""Embedding: workers, what is kept between runs, and what makes it go stale."""

import os
import shutil

import cv2
import numpy as np
import pytest

from tools.ijbc_eval import embed
from tools.ijbc_eval.embed import EmbeddingStore, UnreadableImage, aligned_batches, read_image
from tools.ijbc_eval.files import EvalError
from tools.ijbc_eval.models import ModelFile
from tools.ijbc_eval.protocol import Protocol


@pytest.fixture
def small(tmp_path, make_ijb, save_model):
    made = make_ijb(tmp_path / "data", subjects=4, seed=9)
    return made, ModelFile(str(save_model(tmp_path / "net" / "model.pt")), "tiny")


@pytest.fixture
def count_loads(monkeypatch):
    loads = []
    original = embed.load_model
    monkeypatch.setattr(embed, "load_model", lambda *args: loads.append(args) or original(*args))
    return loads


def open_store(made, cache, **options):
    protocol = Protocol(made.data_dir, made.subset, cache)
    return EmbeddingStore(protocol, protocol.faces(), cache, workers=0, **options)


def test_workers_deliver_the_same_in_the_same_order(small):
    made, _ = small
    faces = open_store(made, made.data_dir / "cache").faces
    alone = [images.numpy() for images, _ in aligned_batches(made.root / "loose_crop", faces, 5, 0)]
    aided = [images.numpy() for images, _ in aligned_batches(made.root / "loose_crop", faces, 5, 2)]
    assert len(alone) == -(-len(made.faces) // 5)
    np.testing.assert_array_equal(np.concatenate(alone), np.concatenate(aided))


def test_embeddings_are_computed_once(small, tmp_path, count_loads):
    made, model = small
    first = open_store(made, tmp_path / "cache").get(model)
    again = open_store(made, tmp_path / "cache").get(model)
    assert len(count_loads) == 1
    np.testing.assert_array_equal(first.embs, again.embs)
    assert first.embs.shape == first.embs_f.shape == (len(made.faces), 16)
    assert open_store(made, tmp_path / "cache").width(model) == 16
    assert len(count_loads) == 1


def test_the_key_is_content_not_place(small, tmp_path, count_loads):
    made, model = small
    open_store(made, tmp_path / "cache").get(model)
    shutil.copytree(made.data_dir, tmp_path / "moved")
    shutil.copy(model.file, tmp_path / "other_name.pt")
    made.data_dir = tmp_path / "moved"
    open_store(made, tmp_path / "cache").get(ModelFile(str(tmp_path / "other_name.pt"), "tiny"))
    assert len(count_loads) == 1


def test_the_key_contains_every_digit_of_the_input_scale(small, tmp_path, count_loads):
    made, model = small
    scales = 128.0, 127.5, 127.5000001
    found = [open_store(made, tmp_path / "cache", input_scale=scale).get(model).embs for scale in scales]
    assert len(count_loads) == 3
    assert not np.allclose(found[0], found[1], atol=1e-6)
    for scale, expected in zip(scales, found):
        np.testing.assert_array_equal(open_store(made, tmp_path / "cache", input_scale=scale).get(model).embs, expected)
    open_store(made, tmp_path / "cache").get(model)
    assert len(count_loads) == 3  # 128 is the default


def test_fresh_computes_again(small, tmp_path, count_loads):
    made, model = small
    open_store(made, tmp_path / "cache").get(model)
    open_store(made, tmp_path / "cache", fresh=True).get(model)
    assert len(count_loads) == 2


def test_a_changed_image_is_noticed_even_with_its_old_time(small, tmp_path, count_loads):
    made, model = small
    path = made.root / "loose_crop" / "2.jpg"
    before = open_store(made, tmp_path / "cache").get(model)
    times = path.stat()
    cv2.imwrite(str(path), 255 - cv2.imread(str(path)))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = open_store(made, tmp_path / "cache").get(model)
    assert len(count_loads) == 2
    assert not np.array_equal(before.embs[1], after.embs[1])
    np.testing.assert_array_equal(before.embs[0], after.embs[0])


def test_changed_landmarks_and_models_are_noticed(small, tmp_path, count_loads, rewrite_meta, save_model):
    made, model = small
    before = open_store(made, tmp_path / "cache").get(model)
    made.faces[0][3][0] += 9
    rewrite_meta(made)
    after = open_store(made, tmp_path / "cache").get(model)
    assert not np.array_equal(before.embs[0], after.embs[0])
    save_model(tmp_path / "net" / "model.pt", seed=7)
    other = open_store(made, tmp_path / "cache").get(model)
    assert not np.array_equal(other.embs[1], after.embs[1])
    assert len(count_loads) == 3


def test_a_damaged_cache_is_computed_again(small, tmp_path, count_loads, capsys):
    made, model = small
    before = open_store(made, tmp_path / "cache").get(model)
    expected = np.array(before.embs)
    for path in (tmp_path / "cache").rglob("*.*"):
        path.write_bytes(path.read_bytes()[:60])
    after = open_store(made, tmp_path / "cache").get(model)
    assert len(count_loads) == 2
    np.testing.assert_array_equal(after.embs, expected)
    assert "damaged" in capsys.readouterr().err


def test_nothing_is_left_behind_by_a_failure(small, tmp_path):
    made, model = small
    (made.root / "loose_crop" / "3.jpg").write_bytes(b"no image")
    with pytest.raises(EvalError, match=r"3\.jpg"):
        open_store(made, tmp_path / "cache").get(model)
    assert not list((tmp_path / "cache" / "embeddings").iterdir())


def test_the_data_directory_is_only_read(small, tmp_path):
    made, model = small
    before = sorted(str(path) for path in made.data_dir.rglob("*"))
    open_store(made, tmp_path / "cache").get(model)
    assert sorted(str(path) for path in made.data_dir.rglob("*")) == before


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_truncated_images_are_unreadable(tmp_path, suffix):
    path = tmp_path / f"image{suffix}"
    image = np.random.default_rng(0).integers(0, 255, (60, 50, 3)).astype(np.uint8)
    cv2.imwrite(str(path), image)
    assert read_image(path).shape == (60, 50, 3)
    if suffix == ".png":
        np.testing.assert_array_equal(read_image(path), image[..., ::-1])
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:cut])
        with pytest.raises(UnreadableImage):
            read_image(path)


def test_a_model_that_gives_nan_is_an_error(small, tmp_path, monkeypatch):
    made, model = small

    class Broken:
        num_features = 4

        def __call__(self, images):
            return np.full((len(images), 4), np.nan, np.float32)

    monkeypatch.setattr(embed, "load_model", lambda *args: Broken())
    with pytest.raises(EvalError, match=r"1\.jpg is not finite"):
        open_store(made, tmp_path / "cache", skip_bad=True).get(model)
