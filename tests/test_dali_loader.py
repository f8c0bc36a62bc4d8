"""The DALI loader against `TrainLoader`; each test with a stand-in for DALI and, where it is installed, with DALI."""

import collections
import sys
import weakref

import cv2
import numpy as np
import pytest
import torch

import dali_loader
import recordio
from dali_loader import DaliError, DaliLoader
from dataset import RecordDataset, open_train_set
from loader import ShuffledRows, TrainLoader, to_input
from recordio import RecordError

try:
    import nvidia.dali  # noqa: F401

    WITHOUT_DALI = None
except ImportError as error:
    WITHOUT_DALI = f"needs NVIDIA DALI: {error}"


class StandIn:
    """Draws its steps ahead as DALI's pipeline does, and decodes by OpenCV; `refuses` are images that it cannot."""

    refuses = []

    def __init__(self, steps, batch_size, num_threads, device):
        self.steps, self.batch_size, self.device = steps, batch_size, device
        self.ahead = collections.deque(next(steps, None) for _ in range(dali_loader._IN_DALI - 1))
        assert num_threads >= 1

    def run(self):
        self.ahead.append(next(self.steps, None))
        step = self.ahead.popleft()
        if step is None:
            raise StopIteration
        encoded, sizes, mirrored = step
        assert len(encoded) == len(sizes) == len(mirrored) == self.batch_size and mirrored.dtype == np.int32
        images = [data[:size] for data, size in zip(encoded, sizes)]
        if any(image.tobytes() in self.refuses for image in images):
            raise RuntimeError("Critical error in pipeline")
        images = [cv2.cvtColor(cv2.imdecode(image, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB) for image in images]
        return to_input(torch.from_numpy(np.stack(images)), torch.from_numpy(mirrored).bool())


@pytest.fixture(params=["stand-in", pytest.param("dali", marks=pytest.mark.skipif(
    WITHOUT_DALI is not None, reason=str(WITHOUT_DALI)
))])
def decoder(request, monkeypatch):
    if request.param == "stand-in":
        monkeypatch.setattr(dali_loader, "_Decoder", StandIn)
        monkeypatch.setattr(dali_loader, "_require_dali", lambda: None)
    return request.param


@pytest.fixture(scope="module")
def faces(tmp_path_factory, make_record_set):
    return RecordDataset(make_record_set(tmp_path_factory.mktemp("faces"), [i % 7 for i in range(61)]))


def epoch(loader, number=0, start_step=0):
    loader.set_epoch(number, start_step)
    return list(loader)


def assert_same(batches, expected):
    """Index and labels bit for bit, images to two grey values.

    Measured on the CPU (DALI 2.4.0, OpenCV 5.0, both with libjpeg-turbo): the same pixels, floats within 1.2e-7.
    """
    assert len(batches) == len(expected)
    for (images, labels, index), (its_images, its_labels, its_index) in zip(batches, expected):
        assert torch.equal(labels, its_labels) and torch.equal(index, its_index)
        assert labels.dtype == index.dtype == torch.int64
        assert images.shape == its_images.shape and images.dtype == torch.float32 and images.is_contiguous()
        assert (images - its_images).abs().max() < 2.01 / 127.5 and (images - its_images).abs().mean() < 0.1 / 127.5


LOADERS = (DaliLoader, TrainLoader)


def until_error(loader):
    """The batches that come before an error, and its message. The error itself would keep the loader's workers."""
    batches = []
    try:
        batches.extend(loader)
    except (RecordError, RuntimeError) as error:
        return batches, str(error)
    return batches, ""


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_train_loader(faces, decoder, workers):
    loader, reference = (make(faces, 8, "cpu", workers, seed=5) for make in LOADERS)
    assert len(loader) == len(reference) == 7
    for number in (0, 1):
        assert_same(epoch(loader, number), epoch(reference, number))


def test_mirroring_is_that_of_the_plan(faces, decoder):
    loader, mirrored = DaliLoader(faces, 20, "cpu", 0, seed=5), 0
    for images, _, index in epoch(loader):
        for image, row in zip(images, index.tolist()):
            plain = faces[row][0].permute(2, 0, 1) / 127.5 - 1
            upright, flipped = ((image - its).abs().mean() < 0.1 / 127.5 for its in (plain, plain.flip(-1)))
            assert upright != flipped
            mirrored += flipped
    assert mirrored == sum(step[1].sum() for step in loader._plan) and 10 < mirrored < 50


def test_pixels_are_scaled_as_the_formula_says(tmp_path, decoder):
    grey = np.repeat(np.arange(256, dtype=np.uint8).repeat(49).reshape(112, 112, 1), 3, axis=2)
    assert grey.min() == 0 and grey.max() == 255
    faces = write_images(tmp_path, [cv2.imencode(".png", grey)[1].tobytes()] * 2)
    for images, _, index in DaliLoader(faces, 1, "cpu", 0, seed=1):
        images = images[0].double()
        expected = (torch.from_numpy(grey).permute(2, 0, 1).double() / 255 - 0.5) / 0.5
        assert min((images - its).abs().max() for its in (expected, expected.flip(-1))) < 3e-7


def test_a_restart_inside_an_epoch_continues_it(faces, decoder):
    loader = DaliLoader(faces, 8, "cpu", 0, seed=5)
    whole = epoch(loader, 3)
    assert_same(epoch(loader, 3, start_step=4), whole[4:])
    assert_same(epoch(loader, 3, start_step=6), whole[6:])
    assert epoch(loader, 3, start_step=7) == []
    with pytest.raises(ValueError, match="start_step 8"):
        loader.set_epoch(0, 8)


class Announced:
    """What a loader tells of the coming rows; like OldFeatures it forgets those that are more than so many."""

    def __init__(self):
        self.rows = collections.deque()

    def prefetch(self, rows, batches):
        while len(self.rows) >= batches:
            self.rows.popleft()
        self.rows.append(rows.tolist())


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_rows_are_announced_ahead_and_not_forgotten(faces, decoder, workers):
    loader, announced = DaliLoader(faces, 3, "cpu", workers), Announced()
    loader.read_ahead(announced)
    ahead = []
    for _, _, index in loader:
        ahead.append(len(announced.rows) - 1)
        while announced.rows[0] != index.tolist():
            announced.rows.popleft()
        announced.rows.popleft()
    assert len(ahead) == 20 and max(ahead) >= 2


def test_ranks_take_their_slices_of_the_same_global_batches(faces, decoder):
    whole = epoch(TrainLoader(faces, 12, "cpu", 0, seed=5))
    ranks = [epoch(DaliLoader(faces, 6, "cpu", 0, 5, rank, 2)) for rank in (0, 1)]
    assert_same([tuple(torch.cat(parts) for parts in zip(*step)) for step in zip(*ranks)], whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_one_loader_through_many_epochs_some_left_early(faces, decoder, workers):
    loader, reference = (make(faces, 6, "cpu", workers, seed=5) for make in LOADERS)
    for number, steps in ((0, 10), (1, 1), (2, 10), (3, 4), (4, 10)):
        loader.set_epoch(number)
        taken = [batch for batch, _ in zip(loader, range(steps))]
        assert_same(taken, epoch(reference, number)[:steps])


def test_batches_stay_as_they_were_when_later_ones_arrive(faces, decoder):
    kept = [(images, images.clone()) for images, _, _ in DaliLoader(faces, 6, "cpu", 0, seed=5)]
    assert all(torch.equal(images, copy) for images, copy in kept) and len(kept) == 10


def test_the_training_generator_is_left_alone(faces, decoder):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    epoch(DaliLoader(faces, 30, "cpu", 1))
    assert torch.equal(torch.rand(3), expected)


def test_fewer_images_than_a_global_batch(faces, decoder):
    assert len(DaliLoader(faces, 10, "cpu", 0, world_size=4)) == 1
    with pytest.raises(ValueError, match=r"train\.rec has 61 images, fewer than one global batch of 16 x 4 ranks"):
        DaliLoader(faces, 16, "cpu", 0, world_size=4)


def write_images(folder, images, label=0.0):
    """A set of these encoded images, keys 1 ...; the label of the last one."""
    with recordio.RecordWriter(folder / "train.rec") as writer:
        writer.write(0, recordio.pack(recordio.IRHeader(0, [len(images) + 1, 3], 0, 0), b""))
        for key, image in enumerate(images, start=1):
            writer.write(key, recordio.pack(recordio.IRHeader(0, label * (key == len(images)), key, 0), image))
    return RecordDataset(folder)


def encode(kind, image, *options):
    return cv2.imencode(kind, image, list(options))[1].tobytes()


def picture(seed, size=112):
    """A smooth random picture, BGR uint8 [size, size, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def test_images_of_every_kind(tmp_path, decoder):
    colour = [picture(seed) for seed in range(6)]
    kinds = [
        encode(".png", colour[0]),
        encode(".png", colour[1].astype(np.uint16) * 257),
        encode(".png", np.dstack([colour[2], colour[2][:, :, 0]])),
        encode(".png", colour[3][:, :, 0]),
        encode(".jpg", colour[4][:, :, 1]),
        encode(".jpg", colour[5], cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
        encode(".jpg", colour[5], cv2.IMWRITE_JPEG_QUALITY, 100) + bytes(40),
    ]
    faces = write_images(tmp_path, kinds)
    assert_same(epoch(DaliLoader(faces, 7, "cpu", 0)), epoch(TrainLoader(faces, 7, "cpu", 0)))


def test_an_image_of_more_bytes_than_its_pixels(tmp_path, decoder):
    noise = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    images = [encode(".png", noise), JPEG, encode(".jpg", picture(1)) + bytes(40000)]
    assert [len(image) > noise.size for image in images] == [True, False, True]
    faces = write_images(tmp_path, images)
    for batch_size in (1, 3):
        loaders = [make(faces, batch_size, "cpu", 0) for make in LOADERS]
        assert_same(*map(epoch, loaders))


JPEG = encode(".jpg", picture(0), cv2.IMWRITE_JPEG_QUALITY, 95)
NO_SCAN = JPEG[:JPEG.index(b"\xff\xda")] + JPEG[-2:]  # begins and ends as it should; no decoder takes it


@pytest.mark.parametrize("image, label, reason", [
    (b"", 0.0, "its 0 bytes do not decode as an image"),
    (b"no image" * 99, 0.0, "its 792 bytes do not decode as an image"),
    (JPEG[:3000], 0.0, "its 3000 bytes do not decode as an image"),
    (JPEG[:-2], 0.0, "bytes do not decode as an image"),
    (NO_SCAN, 0.0, "bytes do not decode as an image"),
    (encode(".png", picture(0))[:-5000], 0.0, "bytes do not decode as an image"),
    (encode(".jpg", picture(0, 100)), 0.0, "image is 100 x 100, not 112 x 112"),
    (JPEG, 3.0, "label 3 is not a class; there are 3, 0 to 2"),
], ids=["empty", "no image", "half", "no end", "no scan", "half a png", "size", "label"])
def test_a_broken_record_is_named_after_the_batches_before_it(tmp_path, decoder, image, label, reason):
    faces = write_images(tmp_path, [JPEG] * 30 + [image], label)
    (batches, message), expected = (until_error(make(faces, 3, "cpu", 0, seed=1)) for make in LOADERS)
    assert message == expected[1] and reason in message
    assert f"{faces.path}: key 31 at offset {faces.reader.offset(31)}: " in message
    assert_same(batches, expected[0])
    assert len(batches) == [30 in rows for rows, _ in ShuffledRows(31, 3, 1, 0, 1)].index(True) > 0


@pytest.mark.parametrize("image", [JPEG[:3000], JPEG[:-2], encode(".png", picture(0))[:-12]])
def test_a_cut_image_is_not_left_to_dali(tmp_path, image):
    places = np.empty((1, 112, 112, 3), np.uint8)
    with pytest.raises(RecordError, match="key 1 at offset .* bytes do not decode as an image"):
        dali_loader._Undecoded(write_images(tmp_path, [image])).fill([0], places)


def test_a_loader_goes_on_after_a_broken_record(tmp_path, decoder):
    faces = write_images(tmp_path, [JPEG] * 30 + [b""])
    loader, reference = (make(faces, 3, "cpu", 1, seed=1) for make in LOADERS)
    for number in range(3):
        loader.set_epoch(number)
        reference.set_epoch(number)
        (batches, message), expected = until_error(loader), until_error(reference)
        assert_same(batches, expected[0])
        assert message == expected[1] and (number == 2 or "key 31 at offset" in message)


@pytest.mark.skipif(WITHOUT_DALI is not None, reason=str(WITHOUT_DALI))
def test_no_pipeline_is_left_for_forked_processes_to_collect(faces, tmp_path, monkeypatch):
    pipelines = []

    class Watched(dali_loader._Decoder):
        def __init__(self, *args):
            super().__init__(*args)
            pipelines.append(weakref.ref(self._pipeline))

    monkeypatch.setattr(dali_loader, "_Decoder", Watched)
    next(iter(DaliLoader(faces, 8, "cpu", 0)))
    batches = iter(DaliLoader(faces, 8, "cpu", 0))
    list(batches)
    with pytest.raises(RecordError, match="key 2 at offset") as caught:
        list(DaliLoader(write_images(tmp_path, [JPEG, NO_SCAN]), 2, "cpu", 0))
    assert len(pipelines) == 3 and not any(pipeline() for pipeline in pipelines) and batches and caught


def test_an_image_that_dali_alone_refuses_is_named(tmp_path, monkeypatch):
    images = [encode(".jpg", image) for image in map(picture, range(20))]
    monkeypatch.setattr(dali_loader, "_Decoder", StandIn)
    monkeypatch.setattr(dali_loader, "_require_dali", lambda: None)
    monkeypatch.setattr(StandIn, "refuses", [images[13]])
    faces = write_images(tmp_path, images)
    _, message = until_error(DaliLoader(faces, 4, "cpu", 0))
    assert message == (
        f"{faces.path}: key 14 at offset {faces.reader.offset(14)}: "
        f"OpenCV decodes this image, DALI does not; set dali = False"
    )


def test_an_error_that_no_record_explains_is_passed_on(faces, monkeypatch):
    class OutOfMemory(StandIn):
        def run(self):
            if self.batch_size > 1:
                raise RuntimeError("out of memory")
            return super().run()

    monkeypatch.setattr(dali_loader, "_Decoder", OutOfMemory)
    monkeypatch.setattr(dali_loader, "_require_dali", lambda: None)
    assert until_error(DaliLoader(faces, 4, "cpu", 0)) == ([], "out of memory")


@pytest.mark.parametrize("cuda, package", [("12.8", "cuda120"), ("13.2", "cuda130"), (None, "cuda120")])
def test_without_dali_the_error_says_what_to_install(faces, monkeypatch, cuda, package):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(DaliError, match=rf"pip install nvidia-dali-{package}, or set dali = False") as caught:
        DaliLoader(faces, 8, "cpu", 0)
    assert "\n" not in str(caught.value)


def test_synthetic_images_are_refused(decoder):
    with pytest.raises(DaliError, match='rec = "synthetic" is none; set dali = False'):
        DaliLoader(open_train_set("synthetic", num_classes=5, num_image=20), 4, "cpu", 0)


@pytest.mark.skipif(WITHOUT_DALI is not None or not torch.cuda.is_available(), reason="needs NVIDIA DALI and a GPU")
def test_nvjpeg_gives_nearly_what_opencv_gives(faces):
    for batch, expected in zip(DaliLoader(faces, 6, "cuda", 2), TrainLoader(faces, 6, "cpu", 2), strict=True):
        assert batch[0].is_cuda and batch[1].is_cuda and not batch[2].is_cuda
        assert torch.equal(batch[1].cpu(), expected[1]) and torch.equal(batch[2], expected[2])
        difference = (batch[0].cpu() - expected[0]).abs() * 127.5
        assert difference.mean() < 1 and difference.max() < 16  # grey values: another inverse DCT, no more
