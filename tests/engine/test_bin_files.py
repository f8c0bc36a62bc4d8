"""The .bin reader on what the picklers write, and on what they never would."""

import os
import pickle
import pickletools
import struct
import tracemalloc

import pytest
from hypothesis import example, given, settings, strategies

import engine.verification
from engine import bin_files
from engine.bin_files import VerificationError, read_bin
from tests.pickles import plain_load, python2_pickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
IMAGES = [b"\xff\xd8\xff" + bytes(range(0, 256, 5)) * 6, b"'\"\\\n\r\0\x80\\x41", b'only "these"', b"only 'these'"]
SAME = [True, False]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "set.bin"


def read(path, data):
    path.write_bytes(data)
    images, same = read_bin(path)
    assert type(images) is list and same.dtype == bool
    return images, same.tolist()


def refused(path, data, why=""):
    path.write_bytes(data)
    with pytest.raises(VerificationError, match=rf"set\.bin: not a verification set: .*{why}") as caught:
        read_bin(path)
    assert len(str(caught.value)) < len(str(path)) + 400


def every_way(images, same):
    """The set as each pickler writes it."""
    yield from (pickle.dumps((images, same), protocol) for protocol in PROTOCOLS)
    yield from (python2_pickle(images, same, protocol) for protocol in range(3))


# --- what the picklers write -----------------------------------------------------------------------------------------

def test_the_name_under_which_it_is_known():
    assert engine.verification.read_bin is read_bin and engine.verification.VerificationError is VerificationError


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reads_every_pickle_protocol(path, protocol):
    assert read(path, pickle.dumps((IMAGES, SAME), protocol)) == (IMAGES, SAME)
    assert read(path, pickletools.optimize(pickle.dumps((IMAGES, SAME), protocol))) == (IMAGES, SAME)


@pytest.mark.parametrize("protocol", range(3))
def test_reads_what_python_2_wrote(path, protocol):
    data = python2_pickle(IMAGES, SAME, protocol)
    assert plain_load(data) == (IMAGES, SAME)
    assert read(path, data) == (IMAGES, SAME)


def test_lists_longer_than_a_batch_of_the_pickler_and_a_memo_longer_than_a_byte(path):
    images = [str(number).encode() * 100 for number in range(2400)]
    same = [number % 3 == 0 for number in range(1200)]
    for data in every_way(images, same):
        assert read(path, data) == (images, same)


def test_an_image_that_occurs_again_is_not_copied(path):
    image = b"x" * 1000
    for data in every_way([image] * 8, [True] * 4):
        assert read(path, data) == ([image] * 8, [True] * 4) and len(data) < 2500
        assert len({id(each) for each in read_bin(path)[0]}) == 1


def test_what_follows_the_pickle_is_left_alone(path):
    assert read(path, pickle.dumps((IMAGES, SAME)) + b"\0" * 512) == (IMAGES, SAME)


def test_numbers_that_are_booleans(path):
    for protocol in PROTOCOLS:
        assert read(path, pickle.dumps((IMAGES, [1, 0]), protocol)) == (IMAGES, SAME)
        refused(path, pickle.dumps((IMAGES, [1, 2]), protocol))
        refused(path, pickle.dumps((IMAGES, [1, -1]), protocol))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(strategies.lists(strategies.tuples(strategies.binary(min_size=1), strategies.binary(min_size=1),
                                          strategies.booleans()), min_size=1, max_size=6))
def test_any_set_is_read_back(tmp_path_factory, pairs):
    images, same = [image for pair in pairs for image in pair[:2]], [pair[2] for pair in pairs]
    path = tmp_path_factory.getbasetemp() / "any.bin"
    for data in every_way(images, same):
        assert read(path, data) == (images, same) == plain_load(data)


# --- what is no set --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content, why", [
    (([b"x"], [True]), "2·N images and N booleans, N > 0, not 1 and 1"),
    (([b"x", b"y", b"z"], [True]), "not 3 and 1"),
    (([], []), "not 0 and 0"),
    (([b"x", "y"], [True]), "image 1 is not bytes"),
    (([b"x", True], [True]), "image 1 is not bytes"),
    (([b"x", [b"y"]], [True]), "more than 2 lists"),
    (([b"x", b"y"], [b"\1"]), "entry of the second list 0 is not a boolean"),
    (([b"x", b"y"], [3]), "the number b'\\\\x03' is no boolean"),
    (([b"x", b"y"], [None]), "NONE has no place"),
    (([b"x", b"y"], [1.0]), "BINFLOAT has no place"),
    (([b"x", b"y"], (True,)), "TUPLE1 has no place"),
    (([b"x", b"y"], (True, False)), "no pair of lists"),
    ((b"x", b"y", True), "TUPLE3 has no place"),
    ([[b"x", b"y"], [True]], "more than 2 lists"),
    ({"images": [b"x", b"y"], "same": [True]}, "EMPTY_DICT has no place"),
    ((bytearray(b"x"), [True]), "BYTEARRAY8|bytearray"),
    (b"xy", "no pair of lists"),
    (True, "no pair of lists"),
])
def test_wrong_content_is_an_error(path, content, why):
    refused(path, pickle.dumps(content, 4), why)
    for protocol in PROTOCOLS:
        refused(path, pickle.dumps(content, protocol))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_code_runs(path, tmp_path, protocol):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    for content in ([Evil()], ([Evil(), b"x"], [True]), ([b"x", b"y"], [Evil()])):
        refused(path, pickle.dumps(content, protocol), r"it asks for posix\.mkdir, which has no place")
    assert not (tmp_path / "owned").exists()


def test_only_the_encoding_of_the_pickler_is_called(path):
    whole = pickle.dumps((IMAGES, SAME), 2)
    for other in (b"utf-8", b"UTF-16", b"bz2_codec"):
        assert b"X\x06\0\0\0latin1" in whole
        refused(path, whole.replace(b"X\x06\0\0\0latin1", b"X" + struct.pack("<I", len(other)) + other), "calls what")
    for name in (b"decode", b"lookup", b"encode.__class__"):
        refused(path, whole.replace(b"c_codecs\nencode\n", b"c_codecs\n" + name + b"\n"), rf"_codecs\.{name.decode()}")
    refused(path, b"\x80\x02c_codecs\nencode\n.", "no pair of lists")
    refused(path, b"\x80\x02c_codecs\nencode\nX\x02\0\0\0\xc4\x80", "latin-1")


def test_cut_anywhere_it_ends_too_early(path):
    for whole in every_way(IMAGES, SAME):
        for length in range(1, len(whole), 3):
            refused(path, whole[:length], "ends too early")
    refused(path, b"", "empty")


def test_an_opcode_across_the_end_of_its_frame_is_refused(path):
    whole = pickle.dumps((IMAGES, SAME), 4)
    protocol, opcodes = whole[:2], whole[11:]
    assert whole[2:11] == b"\x95" + struct.pack("<Q", len(opcodes)) and opcodes[:4] == b"]\x94(B"

    def framed(length):
        return protocol + b"\x95" + struct.pack("<Q", length) + opcodes

    assert read(path, framed(3)) == (IMAGES, SAME) == plain_load(framed(3))     # the rest need not be in one
    for length in (4, 8, 20):
        refused(path, framed(length), "BINBYTES goes beyond its frame")
    with pytest.raises(pickle.UnpicklingError):     # which lets one end between an opcode and what belongs to it
        plain_load(framed(20))
    refused(path, framed(len(opcodes) + 1), "ends too early")
    for length in (20, 4):
        whole = protocol + b"\x95" + struct.pack("<Q", length) + b"\x95" + struct.pack("<Q", 4) + opcodes
        refused(path, whole, "a frame begins in another one")


def test_what_is_no_file_is_named(path, tmp_path):
    for target in (path, tmp_path):
        with pytest.raises(VerificationError, match="no such verification set; .* take it out of val_targets"):
            read_bin(target)
    os.mkfifo(path)  # to open it would wait for a writer
    with pytest.raises(VerificationError, match="no such verification set"):
        read_bin(path)


# --- what only an attacker writes ------------------------------------------------------------------------------------

def within_bounds(path, data):
    """Refused, or read, in memory that is bounded by the file's size."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        read_bin(path)
    except VerificationError as error:
        assert len(str(error)) < len(str(path)) + 400
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 100_000 + 50 * len(data)


@pytest.mark.parametrize("opcode", [name for name in pickletools.opcodes if name.code.encode("latin-1")
                                    not in bin_files._OPCODES and name.name != "STOP"], ids=lambda each: each.name)
def test_every_other_opcode_is_refused_by_name(path, opcode):
    """Persistent ids, extensions, classes, out-of-band buffers, dictionaries, sets, long integers, ..."""
    for argument in (b"", b"\0" * 8, b"\xff" * 8, b"os\nsystem\n"):
        before = b"\x80\x05" + pickle.dumps(IMAGES)[2:-1]
        refused(path, before + opcode.code.encode("latin-1") + argument + b".", f"{opcode.name} has no place")


LENGTHS = {b"U": 1, b"T": 4, b"C": 1, b"B": 4, b"\x8e": 8, b"X": 4, b"\x8c": 1, b"\x95": 8}


@pytest.mark.parametrize("opcode", LENGTHS)
def test_a_length_beyond_the_file_reserves_nothing(path, opcode):
    for length in (6, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1):
        if length < 256 ** LENGTHS[opcode]:
            data = b"\x80\x04" + opcode + length.to_bytes(LENGTHS[opcode], "little") + b"five."
            refused(path, data, "ends too early")
            within_bounds(path, data)


@pytest.mark.parametrize("index", [99, 255, 2**31, 2**32 - 2, 2**32 - 1])
def test_a_memo_index_reserves_nothing(path, index):
    """With 2**32 - 2 Python's unpickler reserves 64 GB."""
    begin = b"\x80\x02]"
    puts = [b"r" + struct.pack("<I", index), b"p%d\n" % index, b"q" + bytes([min(index, 255)])]
    for data in [*(begin + put + b"." for put in puts), begin + b"p" + b"9" * 10000 + b"\n."]:
        refused(path, data, "out of turn|no number")
        within_bounds(path, data)
    for get in (b"j" + struct.pack("<I", index), b"g%d\n" % index, b"h" + bytes([min(index, 255)]), b"g-1\n"):
        refused(path, begin + b"q\0" + get + b".", "is empty|no number")


def test_tuples_that_hold_the_one_before_twice_are_not_walked_through(path):
    """2**60 values, to whoever compares, hashes or prints them."""
    doubled = b"".join(b"q" + bytes([level]) + b"h" + bytes([level]) + b"\x86" for level in range(60))
    deep = b"\x80\x02\x88" + doubled
    for data in (deep + b".", b"\x80\x02](U\1xU\1ye](" + deep[2:] + b"e\x86.", deep + b"R.",
                 b"\x80\x02c_codecs\nencode\n" + deep[2:] + b"R.", deep + b"\x93."):
        refused(path, data)
        within_bounds(path, data)


def test_values_inside_themselves_are_refused(path):
    for data in (b"\x80\x02]q\0h\0a.", b"\x80\x02]q\0h\0a]\x88a\x86.", b"\x80\x02]q\0](h\0h\0e\x86.",
                 b"\x80\x02]q\0U\1xaU\1xah\0\x86.", b"\x80\x02]q\0(h\0h\0t."):
        refused(path, data)


@pytest.mark.parametrize("nested", [b"(", b"]", b"]a", b"(]", b"\x88\x86", b"\x88\x88\x86q\0", b"(\x88"])
def test_deep_nests_are_refused(path, nested):
    for data in (nested * 5_000, b"\x88" * 5_000 + nested[-1:] * 5_000 + b"."):
        refused(path, data)
        within_bounds(path, data)


@pytest.mark.parametrize("code", sorted(bin_files._OPCODES))
def test_each_opcode_again_and_again_stays_within_bounds(path, code):
    for argument in (b"", b"\0", b"\1", b"\1a", b"0\n", b"00\n", b"''\n", b"\1\0\0\0a", b"\1\0\0\0\0\0\0\0a"):
        for begin in (b"\x80\x04]\x94", b"\x80\x04\x88\x94"):
            within_bounds(path, begin + (code + argument) * 1000)


def test_references_cost_no_more_than_they_take_in_the_file(path):
    """As copies they would take 20 MB."""
    image, count = bytes(10_000), 2_000
    same = b"](" + b"\x88" * (count // 2) + b"e\x86."
    for begin, each in (
        (b"\x80\x02](B" + struct.pack("<I", len(image)) + image + b"q\0", b"h\0"),
        (b"\x80\x02](c_codecs\nencode\nq\1X" + struct.pack("<I", len(image)) + image + b"q\2X\6\0\0\0latin1q\3\x86q\4R",
         b"h\1h\4R"),
        (b"\x80\x02](c_codecs\nencode\nq\1X" + struct.pack("<I", len(image)) + image + b"q\2X\6\0\0\0latin1q\3\x86q\4R",
         b"h\1h\2h\3\x86R"),
    ):
        data = begin + each * (count - 1) + b"e" + same
        assert read(path, data) == ([image] * count, [True] * (count // 2))
        within_bounds(path, data)


def test_a_list_extended_by_itself_again_and_again_is_refused(path):
    refused(path, b"\x80\x02]q\0" + b"(h\0h\0e" * 100 + b".")


# --- anything --------------------------------------------------------------------------------------------------------

def agrees(path, data):
    """A VerificationError, or what Python's unpickler reads (safe for what read_bin accepts, see its docstring)."""
    path.write_bytes(data)
    try:
        images, same = read_bin(path)
    except VerificationError as error:
        assert str(error).startswith(f"{path}: ") and len(str(error)) < len(str(path)) + 400
    else:
        assert (images, same.tolist()) == plain_load(data)


OPCODE = strategies.sampled_from(sorted(bin_files._OPCODES))
ARGUMENT = strategies.sampled_from(
    [b"", b"\0", b"\1", b"\1a", b"0\n", b"00\n", b"'a'\n", b"\1\0\0\0a", b"_codecs\nencode\n"]
)
PROGRAM = strategies.lists(strategies.tuples(OPCODE, ARGUMENT).map(b"".join), max_size=30).map(b"".join)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(strategies.binary(max_size=200) | PROGRAM.map(lambda program: program + b"."))
@example(b".")
@example(b"(.")
@example(b"]q\0\x94\x94h\1.")
def test_whatever_the_bytes(tmp_path_factory, data):
    agrees(tmp_path_factory.getbasetemp() / "bytes.bin", data)


WAYS = list(every_way(IMAGES, SAME))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(strategies.sampled_from(WAYS), strategies.lists(
    strategies.tuples(strategies.integers(0, 4000), strategies.integers(0, 6), strategies.binary(max_size=3) | PROGRAM),
    min_size=1, max_size=3))
def test_whatever_is_changed_in_a_set(tmp_path_factory, data, edits):
    changed = bytearray(data)
    for place, count, new in edits:
        at = place % len(changed)
        changed[at:at + count] = new
    agrees(tmp_path_factory.getbasetemp() / "changed.bin", bytes(changed))
