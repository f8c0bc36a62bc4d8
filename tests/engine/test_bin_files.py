"""The .bin reader on real pickles and on hostile ones."""

import os
import pickle
import pickletools
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from engine import bin_files
from engine.bin_files import VerificationError, read_bin
from tests.pickles import python2_pickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
IMAGES = [b"\xff\xd8\xff" + bytes(range(0, 256, 5)) * 6, b"'\"\\\n\r\0\x80\\x41", b'only "these"', b"only 'these'"]
SAME = [True, False]
ALLOWED = sorted(bin_files._Unpickler.dispatch)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "set.bin"


def read(path, data):
    path.write_bytes(data)
    images, same = read_bin(path)
    assert type(images) is list and {type(image) for image in images} == {bytes} and same.dtype == bool
    return images, same.tolist()


def refused(path, data, why=""):
    """Refused in one short line, in memory bounded by the file's size."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(VerificationError, match=rf"set\.bin: not a verification set: .*{why}") as caught:
            read_bin(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000 + 50 * len(data)
    assert len(str(caught.value)) < len(str(path)) + 300 and "\n" not in str(caught.value)


# --- what the picklers write -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reads_every_pickle_protocol(path, protocol):
    assert read(path, pickle.dumps((IMAGES, SAME), protocol)) == (IMAGES, SAME)
    assert read(path, pickletools.optimize(pickle.dumps((IMAGES, SAME), protocol)) + b"rest") == (IMAGES, SAME)
    many = [str(number).encode() * 100 for number in range(2400)]  # more than a pickler's batch, or a byte's memo
    assert read(path, pickle.dumps((many, SAME * 600), protocol)) == (many, SAME * 600)


@pytest.mark.parametrize("protocol", range(3))
def test_reads_what_python_2_wrote(path, protocol):
    data = python2_pickle(IMAGES, SAME, protocol)
    images, same = pickle.loads(data, encoding="bytes")
    assert (images, [bool(value) for value in same]) == (IMAGES, SAME), "the test's own pickler"
    assert read(path, data) == (IMAGES, SAME)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "images, same",
    [
        (tuple(IMAGES), tuple(SAME)),
        ([bytearray(image) for image in IMAGES], [np.bool_(value) for value in SAME]),
        ([np.frombuffer(image, np.uint8) for image in IMAGES], np.array(SAME)),
        (
            [np.frombuffer(image, np.uint8)[:, None].copy() for image in IMAGES],
            np.array(SAME, np.int64),
        ),  # as by OpenCV
        (np.array(IMAGES), [1, 0]),
        (np.array(IMAGES, object), [np.int32(1), np.uint8(0)]),
        (list(np.array(IMAGES)), SAME),
        ([list(image) for image in IMAGES], [1.0, 0.0]),
        ([tuple(IMAGES[0]), np.array(IMAGES[1]), *IMAGES[2:]], np.array([1.0, 0.0], np.float32)),
        (IMAGES, bytearray(SAME)),
    ],
    ids="tuples bytearrays uint8 opencv bytes_array objects scalars numbers mixed array".split(),
)
def test_reads_plain_data_in_other_containers(path, images, same, protocol):
    assert read(path, pickle.dumps((images, same), protocol)) == (IMAGES, SAME)
    assert read(path, pickle.dumps([images, same], protocol)) == (IMAGES, SAME)
    pair = np.empty(2, object)
    pair[0], pair[1] = images, same
    assert read(path, pickle.dumps(pair, protocol)) == (IMAGES, SAME)
    if protocol < 4:  # before strings with a length field
        numpy_2 = pickle.dumps((images, same), protocol).replace(b"numpy.core.", b"numpy._core.")
        assert read(path, numpy_2) == (IMAGES, SAME)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reads_one_array_with_a_row_for_each_image(path, protocol):
    rows = [image[:10] for image in IMAGES]
    stacked = np.stack([np.frombuffer(row, np.uint8) for row in rows])
    assert read(path, pickle.dumps((stacked, SAME), protocol)) == (rows, SAME)
    refused(path, pickle.dumps((stacked[:2], SAME), protocol), "2·N images and N booleans, N > 0, not 2 and 2")


# --- what is no set --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, why",
    [
        (([b"x"], [True]), "2·N images and N booleans, N > 0, not 1 and 1"),
        (([b"x", b"y", b"z"], [True]), "not 3 and 1"),
        (([], []), "not 0 and 0"),
        (([b"x", "y"], [True]), "image 1 is not bytes"),
        (([b"x", [b"y"]], [True]), "image 1 is not bytes"),
        (([b"x", np.zeros(3, np.int64)], [True]), "image 1 is not bytes"),
        (([b"x", b"y"], [b"\1"]), "pair 0 has no boolean"),
        (([b"x", b"y"], [-1]), "pair 0 has no boolean"),
        (([b"x", b"y"], np.array([2])), "pair 0 has no boolean"),
        (([b"x", b"y"], [None]), "pair 0 has no boolean"),
        (([b"x", b"y"], [0.5]), "pair 0 has no boolean"),
        (([b"x", b"y"], np.array([1j])), "NumPy array of dtype c16"),
        (([b"x", [256]], [True]), "image 1 is not bytes"),
        ((np.zeros((2, 9), np.uint16), [True]), "not 18 and 1"),
        ((b"x", b"y", True), "not a pair of lists"),
        ((b"xy", [True]), "not a pair of lists"),
        ({"images": [b"x", b"y"], "same": [True]}, "is not allowed"),
        (True, "not a pair of lists"),
    ],
)
def test_wrong_content_is_an_error(path, content, why):
    for protocol in PROTOCOLS:
        refused(path, pickle.dumps(content, protocol), why)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_code_runs(path, tmp_path, protocol):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    for content in ([Evil()], ([Evil(), b"x"], [True]), ([b"x", b"y"], [Evil()])):
        refused(path, pickle.dumps(content, protocol), r"posix\.mkdir', which is not allowed")
    assert not (tmp_path / "owned").exists()


def test_only_the_picklers_calls_are_allowed(path):
    whole = pickle.dumps((IMAGES, SAME), 2)
    for other in (b"utf-8", b"UTF-16", b"bz2_codec"):
        assert b"X\x06\0\0\0latin1" in whole
        refused(
            path, whole.replace(b"X\x06\0\0\0latin1", b"X" + struct.pack("<I", len(other)) + other), "call that is not"
        )
    for name in (b"decode", b"lookup", b"encode.__class__"):
        refused(path, whole.replace(b"c_codecs\nencode\n", b"c_codecs\n" + name + b"\n"), rf"_codecs\.{name.decode()}")
    for start in (b"cbuiltins\nbytearray\n", b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\nscalar\n"):
        refused(path, b"\x80\x02" + start + b"J\xff\xff\xff\x7f\x85R.")  # bytearray(2**31 - 1)
        refused(path, b"\x80\x02" + start + b"U\1xU\1y\x86b.", "state")


def test_a_set_truncated_anywhere_is_refused(path):
    for whole in (pickle.dumps((IMAGES, SAME), 4), pickle.dumps((IMAGES, SAME), 0), python2_pickle(IMAGES, SAME, 2)):
        for length in range(1, len(whole), 5):
            refused(path, whole[:length])
    refused(path, b"", "empty")


def test_a_path_that_is_not_a_file_is_named(path, tmp_path):
    os.mkfifo(path)  # opening it would wait for a writer
    for target in (path, tmp_path, tmp_path / "none.bin"):
        with pytest.raises(VerificationError, match="no such verification set; .* remove it from val_targets"):
            read_bin(target)


# --- what only an attacker writes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "opcode", [each for each in pickletools.opcodes if ord(each.code) not in ALLOWED], ids=lambda each: each.name
)
def test_every_other_opcode_is_refused(path, opcode):
    """Persistent ids, extensions, classes, out-of-band buffers, dictionaries, sets, ..."""
    for argument in (b"", b"\0" * 8, b"\xff" * 8, b"os\nsystem\n"):
        before = b"\x80\x05" + pickle.dumps(IMAGES)[2:-1]
        refused(path, before + opcode.code.encode("latin-1") + argument + b".", "is not allowed")


@pytest.mark.parametrize("opcode", [b"T", b"B", b"X", b"\x8d", b"\x8e", b"\x95", b"\x96", b"\x8a", b"r", b"j"])
def test_no_declared_length_allocates_memory(path, opcode):
    """A length field, or a memo index: with 2**32 - 2 the C unpickler allocates 64 GB."""
    for number in (2**31 - 1, 2**32 - 2, 2**63 - 1, 2**64 - 1):
        refused(path, b"\x80\x04]" + opcode + (number % 2**64).to_bytes(8, "little") + b"five.")
    refused(path, b"\x80\x02]p" + b"9" * 10000 + b"\n.")
    refused(path, pickle.dumps(np.zeros(2, np.uint8), 2).replace(b"K\x02", b"J\xff\xff\xff\x7f"))


def test_exponentially_nested_tuples_are_not_traversed(path):
    """2**60 values if compared, hashed or printed."""
    doubled = b"".join(b"q" + bytes([level]) + b"h" + bytes([level]) + b"\x86" for level in range(60))
    deep = b"\x80\x02\x88" + doubled
    for data in (
        deep + b".",
        b"\x80\x02](U\1xU\1ye](" + deep[2:] + b"e\x86.",
        deep + b"R.",
        deep + b"b.",
        b"\x80\x02c_codecs\nencode\n" + deep[2:] + b"R.",
        deep + b"\x93.",
    ):
        refused(path, data)


def test_self_containing_values_are_refused(path):
    for data in (
        b"\x80\x02]q\0h\0a.",
        b"\x80\x02]q\0h\0a]\x88a\x86.",
        b"\x80\x02]q\0](h\0h\0e\x86.",
        b"\x80\x02]q\0" + b"(h\0h\0e" * 100 + b".",
    ):
        refused(path, data)


@pytest.mark.parametrize("nested", [b"(", b"]", b"]\x94", b"(]", b"\x85", b"\x88\x88\x86q\0", b"\x88\x94", b")"])
def test_as_many_values_as_bytes_are_refused(path, nested):
    refused(path, b"\x80\x04\x88" + nested * (100_000 // len(nested)) + b".")


def test_text_encoded_repeatedly_is_bounded_by_the_file_size(path):
    image = bytes(10_000)
    text = b"X" + struct.pack("<I", len(image)) + image
    begin = b"\x80\x02](c_codecs\nencode\nq\1" + text + b"q\2X\6\0\0\0latin1q\3\x86q\4R"
    refused(path, begin + b"h\1h\4R" * 3999 + b"e](" + b"\x88" * 2000 + b"e\x86.", "larger than its file")
    again = b"\x80\x02](B" + struct.pack("<I", len(image)) + image + b"q\0" + b"h\0" * 1999 + b"e](" + b"\x88" * 1000
    assert read(path, again + b"e\x86.") == ([image] * 2000, [True] * 1000)
    assert len({id(each) for each in read_bin(path)[0]}) == 1, "an image that occurs again is not copied"


def test_a_list_of_numbers_that_occurs_again_is_converted_once(path, monkeypatch):
    converted, convert = [], bin_files._bytes
    monkeypatch.setattr(bin_files, "_bytes", lambda *its: converted.append(its[1]) or convert(*its))
    numbers = b"\x80\x02]]q\0(" + b"K\1" * 10_000 + b"ea(" + b"h\0" * 1999 + b"e](" + b"\x88" * 1000 + b"e\x86."
    assert read(path, numbers) == ([b"\1" * 10_000] * 2000, [True] * 1000) and converted == [0]


# --- anything --------------------------------------------------------------------------------------------------------


def harmless(path, data):
    try:
        images, same = read(path, data)
    except VerificationError as error:
        assert str(error).startswith(f"{path}: ") and len(str(error)) < len(str(path)) + 300
    else:
        assert len(images) == 2 * len(same) > 0


OPCODE = strategies.sampled_from([bytes([code]) for code in ALLOWED])
ARGUMENT = strategies.sampled_from(
    [
        b"",
        b"\0",
        b"\1",
        b"\1a",
        b"0\n",
        b"00\n",
        b"'a'\n",
        b"\1\0\0\0a",
        b"_codecs\nencode\n",
        b"numpy\ndtype\n",
        b"numpy.core.multiarray\n_reconstruct\n",
        b"numpy.core.multiarray\nscalar\n",
    ]
)
PROGRAM = strategies.lists(strategies.tuples(OPCODE, ARGUMENT).map(b"".join), max_size=30).map(b"".join)
WAYS = [pickle.dumps((IMAGES, SAME), protocol) for protocol in PROTOCOLS]
WAYS += [python2_pickle(IMAGES, SAME, protocol) for protocol in range(3)]
WAYS += [pickle.dumps((np.array(IMAGES, object), np.array(SAME)), protocol) for protocol in (2, 5)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(strategies.binary(max_size=200) | PROGRAM.map(lambda program: program + b"."))
def test_random_bytes(tmp_path_factory, data):
    harmless(tmp_path_factory.getbasetemp() / "bytes.bin", data)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    strategies.sampled_from(WAYS),
    strategies.lists(
        strategies.tuples(
            strategies.integers(0, 4000), strategies.integers(0, 6), strategies.binary(max_size=3) | PROGRAM
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_random_edits_of_a_set(tmp_path_factory, data, edits):
    changed = bytearray(data)
    for place, count, new in edits:
        at = place % len(changed)
        changed[at : at + count] = new
    harmless(tmp_path_factory.getbasetemp() / "changed.bin", bytes(changed))
