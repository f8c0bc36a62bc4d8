"""Embedding: images, workers, what is kept between runs, and what makes it go stale or damaged."""

import errno
import os
import shutil
import signal

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from backbones.model_files import ModelFile
from engine.workers import WorkerError
from tools.ijbc_eval import embed
from tools.ijbc_eval.align import REFERENCE, similarity_matrices
from tools.ijbc_eval.embed import EmbeddingStore, image_batches
from tools.ijbc_eval.files import EvalError
from tools.ijbc_eval.images import UnusableImage, aligned_face, read_image
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
    return EmbeddingStore(protocol, protocol.faces(), cache, **{"workers": 0, **options})


def test_workers_deliver_the_same_in_the_same_order(small):
    made, _ = small
    source = open_store(made, made.data_dir / "cache").images
    alone = [images.numpy() for images, _ in image_batches(source, 5, 0)]
    aided = [images.numpy() for images, _ in image_batches(source, 5, 2)]
    assert len(alone) == -(-len(made.faces) // 5) > 2 * 2 + 1  # more batches than slots
    np.testing.assert_array_equal(np.concatenate(alone), np.concatenate(aided))


def test_workers_send_no_images_through_dev_shm(small, monkeypatch):
    """A container has 64 MB of it, and a tensor that a worker cannot send keeps the main process waiting for ever."""

    def refuse(*_):
        os._exit(9)

    for how in ("_share_fd_cpu_", "_share_filename_cpu_", "share_memory_"):
        monkeypatch.setattr(torch.UntypedStorage, how, refuse, raising=False)
    source = open_store(small[0], small[0].data_dir / "cache").images
    [images] = [images for images, _ in image_batches(source, 1000, 1)]
    assert len(images) == len(source) and images.numpy().any(axis=(1, 2, 3)).all()


def test_a_killed_worker_is_one_line(small, monkeypatch, tmp_path):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("tools.ijbc_eval.images.aligned_face", die)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))  # asks more often
    store = open_store(small[0], tmp_path / "cache", workers=2)
    with pytest.raises(WorkerError, match=r"killed by SIGKILL, probably out of memory .*: lower --workers 2"):
        store.get(small[1])
    assert not list((tmp_path / "cache" / "embeddings").iterdir())


def test_workers_that_cannot_start_are_one_line(small, monkeypatch, tmp_path):
    def refuse():
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(WorkerError, match=r"--workers 2: cannot be started \(.*temporarily unavailable\); start fewer"):
        open_store(small[0], tmp_path / "cache", workers=2).get(small[1])


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


def _other_type(path):
    with open(path, "rb") as file:
        array = np.load(file)
        sums = np.load(file)
    with open(path, "wb") as file:
        np.save(file, array.astype(np.float64))
        np.save(file, sums)


def _without_checksums(path):
    np.save(path, np.load(path))


def _one_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _huge(path):
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (2, 10**6, 10**9)}
        np.lib.format.write_array_header_1_0(file, header)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "last bytes": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "a bit": _one_bit,
    "type": _other_type,
    "no checksums": _without_checksums,
    "huge": _huge,
    "another model's": lambda path: shutil.copy2(path.with_name("other"), path),
}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_embeddings_are_computed_again(small, tmp_path, count_loads, capsys, save_model, damage, fresh):
    made, model = small
    folder = tmp_path / "cache" / "embeddings"
    open_store(made, tmp_path / "cache").get(ModelFile(str(save_model(tmp_path / "other.pt", seed=5)), "tiny"))
    [other] = folder.iterdir()
    other.rename(folder / "other")
    before = open_store(made, tmp_path / "cache").get(model)
    expected = [np.array(before.embs), np.array(before.embs_f)]
    [path] = folder.glob("*.npy")
    damage(path)
    capsys.readouterr()
    for loads, lines, again in ((3, 0 if fresh else 1, fresh), (3, 0, False)):
        found = open_store(made, tmp_path / "cache", fresh=again).get(model)
        np.testing.assert_array_equal([found.embs, found.embs_f], expected)
        assert len(count_loads) == loads
        assert capsys.readouterr().err.count(f"{path}: damaged cache (") == lines


@pytest.mark.parametrize("content", [b"", b"\0" * 200, b"[1, 2", b"{}", None])
def test_a_damaged_fingerprint_of_the_images_is_made_again(small, tmp_path, capsys, content):
    made, model = small
    key = open_store(made, tmp_path / "cache").data_key
    [path] = (tmp_path / "cache" / "meta").glob("*_images.json")
    path.write_bytes(path.read_text().replace(key, key[::-1]).encode() if content is None else content)
    for lines in (1, 0):
        assert open_store(made, tmp_path / "cache").data_key == key
        assert capsys.readouterr().err.count(f"{path}: damaged cache (") == lines


def test_room_is_reserved_before_the_first_image_is_read(small, tmp_path, monkeypatch):
    made, model = small
    folder = tmp_path / "cache" / "embeddings"

    class Begun(Exception):
        pass

    def begin(*_):
        [partial] = folder.iterdir()
        assert partial.stat().st_blocks * 512 >= 2 * len(made.faces) * 16 * 4
        raise Begun

    monkeypatch.setattr(embed, "image_batches", begin)
    with pytest.raises(Begun):
        open_store(made, tmp_path / "cache").get(model)

    def full(file, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(embed, "reserve", full)
    with pytest.raises(EvalError, match=r"\.npy: cannot be written \(No space left on device\); make room"):
        open_store(made, tmp_path / "cache").get(model)
    assert not list(folder.iterdir())


def test_what_killed_runs_left_is_removed(small, tmp_path):
    made, _ = small
    for folder in ("embeddings", "meta"):
        (tmp_path / "cache" / folder).mkdir(parents=True)
        (tmp_path / "cache" / folder / ".0f.npy.0a0b0c0d.tmp").touch()
    open_store(made, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.tmp"))


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


@pytest.fixture
def picture():
    coarse = np.random.default_rng(0).integers(0, 256, (7, 6, 3), np.uint8)
    return cv2.resize(coarse, (50, 60), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("kind", [".jpg", ".png", ".bmp", ".tiff", ".webp", ".ppm"])
def test_images_are_what_cv2_imread_gives_whatever_their_name(tmp_path, picture, kind):
    written = tmp_path / f"image{kind}"
    cv2.imwrite(str(written), picture)
    expected = cv2.imread(str(written))
    path = written.rename(tmp_path / "1.jpg")
    np.testing.assert_array_equal(read_image(path), expected[..., ::-1])
    assert expected.shape == (60, 50, 3)


def jpeg(picture, *flags):
    return cv2.imencode(".jpg", picture, flags)[1].tobytes()


def with_segment(data, content):
    """A JPEG with an APP1 segment, as EXIF data are stored."""
    return data[:2] + b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content + data[2:]


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_exif_turns_an_image_as_cv2_imread_does(tmp_path, picture, orientation):
    entry = b"\x01\x12\0\x03\0\0\0\x01\0" + bytes([orientation]) + b"\0\0"
    data = with_segment(jpeg(picture), b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + entry + b"\0\0\0\0")
    (tmp_path / "1.jpg").write_bytes(data)
    found = read_image(tmp_path / "1.jpg")
    np.testing.assert_array_equal(found, cv2.imread(str(tmp_path / "1.jpg"))[..., ::-1])
    assert found.shape == ((50, 60, 3) if orientation == 6 else (60, 50, 3))


@pytest.mark.parametrize("kind", ["jpeg", "progressive", "png"])
def test_truncated_images_are_unusable_and_tails_are_not(tmp_path, picture, kind):
    path = tmp_path / "1.jpg"
    if kind == "png":
        whole = cv2.imencode(".png", picture)[1].tobytes()
        end = whole.rindex(b"IEND") + 4
    else:  # the thumbnail of a photo is a JPEG of its own, with its own end
        whole = jpeg(picture, cv2.IMWRITE_JPEG_PROGRESSIVE, int(kind == "progressive"))
        whole = with_segment(whole, b"Exif\0\0" + jpeg(picture[:8, :8]))
        end = len(whole) - 1
    path.write_bytes(whole)
    expected = read_image(path)
    for tail in (b"\0" * 5000, b"MPF\0" * 2000, b"\xff\xd8\xff\xe0" * 400):
        path.write_bytes(whole + tail)
        np.testing.assert_array_equal(read_image(path), expected)
    for cut in (0, 2, 10, len(whole) // 2, len(whole) - 20, end):
        path.write_bytes(whole[:cut])
        with pytest.raises(UnusableImage):
            read_image(path)


def test_landmarks_that_are_not_the_pictures_own(tmp_path, picture):
    path = tmp_path / "1.png"
    cv2.imwrite(str(path), picture)

    def cut_out(landmarks):
        return aligned_face(path, landmarks, similarity_matrices(landmarks[None])[0])

    inside = REFERENCE / 3 + 8  # in a picture of 50 x 60
    assert cut_out(inside).shape == (112, 112, 3)
    assert cut_out(inside + [-20, 0]).any()  # the left eye is cut off, where a detector guesses it
    for shift in ([60, 0], [0, -50], [-200, -200]):
        with pytest.raises(UnusableImage, match="its landmarks are outside the picture, 50 x 60 pixels"):
            cut_out(inside + shift)
    far = inside.copy()
    far[3] = [30, 140]
    with pytest.raises(UnusableImage, match="outside the picture"):
        cut_out(far)
    cv2.imwrite(str(path), np.zeros_like(picture))
    with pytest.raises(UnusableImage, match="black when aligned"):
        cut_out(inside)


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e31])
def test_a_model_that_gives_no_finite_embedding_is_an_error(small, tmp_path, monkeypatch, value):
    made, model = small

    class Broken:
        num_features = 4

        def __call__(self, images):
            embeddings = np.ones((len(images), 4), np.float32)
            embeddings[1, 2] = value
            return embeddings

    monkeypatch.setattr(embed, "load_model", lambda *args: Broken())
    with pytest.raises(EvalError, match=r"2\.jpg is not finite"):
        open_store(made, tmp_path / "cache", skip_bad=True).get(model)
