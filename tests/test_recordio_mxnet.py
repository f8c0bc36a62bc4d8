"""recordio.py and decode_bgr against MXNet, run in a separate process; skipped if it cannot be imported."""

import json
import random
import struct
import subprocess
import sys

import numpy as np
import pytest

import recordio
from dataset import decode_bgr
from tests.test_dataset_image import PLACES, TURNED, png_with_orientation, with_orientation

# MXNet 1.9.1 asks NumPy for `bool`, a name that NumPy 1.24 took away.
IMPORT = "import numpy\nif 'bool' not in vars(numpy):\n    numpy.bool = bool\nfrom mxnet import image, recordio\n"

PROGRAM = (
    IMPORT
    + """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])

ours = recordio.MXIndexedRecordIO(str(folder / "ours.idx"), str(folder / "ours.rec"), "r")
read = {key: ours.read_idx(key).hex() for key in ours.keys}
order = list(ours.keys)
ours.close()

theirs = recordio.MXIndexedRecordIO(str(folder / "theirs.idx"), str(folder / "theirs.rec"), "w")
for key in order:
    theirs.write_idx(key, bytes.fromhex(read[key]))
theirs.close()

headers = [recordio.IRHeader(*header) for header in json.loads((folder / "headers.json").read_text())]
packed = [recordio.pack(header, b"image") for header in headers]
unpacked = []
for record in packed:
    header, payload = recordio.unpack(record)
    unpacked.append([header.flag, numpy.ravel(header.label).tolist(), header.id, header.id2, payload.hex()])
json.dump({"read": read, "packed": [record.hex() for record in packed], "unpacked": unpacked},
          open(folder / "answer.json", "w"))

images = {path.name: image.imdecode(path.read_bytes()).asnumpy() for path in (folder / "images").iterdir()}
numpy.savez(folder / "images.npz", **images)
"""
)

HEADERS = [
    [0, 0, 0, 0],
    [7, 93430.0, 5179510, 0],
    [0, 0.1, 2**63, 2**64 - 1],
    [0, [5179511.0, 5272942.0], 0, 0],
    [2, [1.5], 3, 4],
    [9, [1, 2, 3, 4, 5], 3, 4],
]


def payloads():
    """Payloads of every length around the padding, and with the magic word at and beside 4-byte boundaries."""
    magic, draw = struct.pack("<I", recordio.MAGIC), random.Random(0)
    cases = [draw.randbytes(length) for length in (*range(10), 4093, 8192)]
    cases += [magic * count for count in (1, 2, 3)]
    cases += [draw.randbytes(before) + magic + draw.randbytes(after) for before in range(9) for after in range(5)]
    cases += [magic + b"abcd" + magic + magic + b"ab" + magic, magic[:2] + magic + magic[2:], magic[1:] * 4]
    for _ in range(100):
        cases.append(b"".join(draw.choice([magic, magic[:3], b"0123", b"4"]) for _ in range(draw.randrange(20))))
    return cases


def oriented():
    """An image with each EXIF orientation in each place, `{name: encoded}`."""
    images = {f"{each}.png": png_with_orientation(each) for each in TURNED}
    for order in "<>":
        for place in PLACES:
            images |= {f"{place} {order} {each}.jpg": with_orientation(place, each, order) for each in TURNED}
    return images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, timeout=120).returncode:
        pytest.skip("mxnet does not import")
    folder = tmp_path_factory.mktemp("mxnet")
    with recordio.RecordWriter(folder / "ours.rec") as writer:
        for place, payload in enumerate(payloads()):
            writer.write(3 * place % 1000, payload)
    (folder / "images").mkdir()
    for name, data in oriented().items():
        (folder / "images" / name).write_bytes(data)
    (folder / "headers.json").write_text(json.dumps(HEADERS))
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def answer(folder):
    return json.loads((folder / "answer.json").read_text())


def test_mxnet_reads_what_we_write(answer):
    assert [bytes.fromhex(payload) for payload in answer["read"].values()] == payloads()
    assert list(answer["read"]) == [str(3 * place % 1000) for place in range(len(payloads()))]


def test_files_are_the_same_byte_for_byte(folder, answer):
    assert (folder / "theirs.rec").read_bytes() == (folder / "ours.rec").read_bytes()
    assert (folder / "theirs.idx").read_bytes() == (folder / "ours.idx").read_bytes()


def test_we_read_what_mxnet_writes(folder, answer):
    with recordio.RecordReader(folder / "theirs.rec") as reader:
        assert [reader.read(key) for key in reader.keys.tolist()] == payloads()


def test_pack_is_the_same_byte_for_byte(answer):
    for header, theirs in zip(HEADERS, answer["packed"], strict=True):
        assert recordio.pack(header, b"image").hex() == theirs


def test_unpack_equals_mxnets(answer):
    for packed, theirs in zip(answer["packed"], answer["unpacked"], strict=True):
        header, payload = recordio.unpack(bytes.fromhex(packed))
        assert [header.flag, np.ravel(header.label).tolist(), header.id, header.id2, payload.hex()] == theirs


def test_images_are_decoded_and_turned_as_by_mxnet(folder):
    theirs = np.load(folder / "images.npz")
    for name, data in oriented().items():
        assert np.array_equal(decode_bgr(np.frombuffer(data, np.uint8))[..., ::-1], theirs[name]), name
