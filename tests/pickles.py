"""Pickles as Python 2 wrote them, for the tests of the .bin reader."""

import struct


def python2_pickle(images, same, protocol):
    """`(images, same)` as Python 2's cPickle writes lists of str and bool: protocol 0, 1 or 2.

    Its memo counts from 1. An object that occurs again is taken from there; as bytes objects are shared here wherever
    they are equal, every equal image is.
    """
    memo = {}

    def put(name):
        memo[name] = index = len(memo) + 1
        if protocol == 0:
            return b"p%d\n" % index
        return b"q" + bytes([index]) if index < 256 else b"r" + struct.pack("<I", index)

    def get(name):
        index = memo[name]
        if protocol == 0:
            return b"g%d\n" % index
        return b"h" + bytes([index]) if index < 256 else b"j" + struct.pack("<I", index)

    def string(data):
        if data in memo:
            return get(data)
        if protocol == 0:
            quote, text = b"'", repr(data)[2:-1].encode()  # of bytes: escaped as Python 2's repr does
            if repr(data)[1] == '"':
                quote = b'"'
            return b"S" + quote + text + quote + b"\n" + put(data)
        length = b"U" + bytes([len(data)]) if len(data) < 256 else b"T" + struct.pack("<I", len(data))
        return length + data + put(data)

    def boolean(value):
        return (b"\x88" if value else b"\x89") if protocol == 2 else b"I%02d\n" % value

    def whole_list(name, items):
        if protocol == 0:
            return b"(l" + put(name) + b"".join(item + b"a" for item in items)
        begin = b"]" + put(name)
        items = list(items)
        batches = [items[i : i + 1000] for i in range(0, len(items), 1000)]
        return begin + b"".join(
            b"(" + b"".join(batch) + b"e" if len(batch) > 1 else batch[0] + b"a" for batch in batches
        )

    def lists():
        yield whole_list("images", (string(image) for image in images))
        yield whole_list("same", map(boolean, same))

    body = b"".join(lists())
    return (b"\x80\x02" if protocol == 2 else b"(") + body + (b"\x86" if protocol == 2 else b"t") + put("pair") + b"."
