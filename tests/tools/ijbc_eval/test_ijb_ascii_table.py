import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.ijbc_eval.ascii_table import read_int_table
from tools.ijbc_eval.files import EvalError

numbers = st.one_of(st.integers(0, 12), st.integers(0, 10**6), st.integers(0, 10**18 - 1))


@given(
    rows=st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=40),
    chunk=st.integers(1, 60),
    separator=st.sampled_from([" ", "\t", "  ", " \t"]),
    newline=st.sampled_from(["\n", "\r\n"]),
    ended=st.booleans(),
)
def test_reads_what_was_written(tmp_path_factory, rows, chunk, separator, newline, ended):
    path = tmp_path_factory.mktemp("table") / "pairs.txt"
    text = newline.join(separator.join(map(str, row)) for row in rows) + (newline if ended else "")
    path.write_bytes(text.encode())
    table = read_int_table(path, 3, "a b c", chunk_bytes=chunk)
    assert table.dtype == np.int64
    assert table.tolist() == [list(row) for row in rows]


@pytest.mark.parametrize("bad", ["1 2", "1 2 3 4", "1 two 3", "1 -2 3", "1 2.0 3", "", "1 " + "9" * 19 + " 0"])
@pytest.mark.parametrize("chunk", [4, 1 << 20])
def test_a_bad_line_is_named(tmp_path, bad, chunk):
    path = tmp_path / "pairs.txt"
    path.write_text(f"1 2 0\n3 4 1\n{bad}\n5 6 0\n")
    with pytest.raises(EvalError, match=r"pairs\.txt line 3: expected `a b c`"):
        read_int_table(path, 3, "a b c", chunk_bytes=chunk)


def test_columns_that_only_sum_up_are_refused(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text("1 2 0 3\n4 1\n")  # six numbers, two lines, yet not three a line
    with pytest.raises(EvalError, match="line 1"):
        read_int_table(path, 3, "a b c")


@pytest.mark.parametrize("text", ["", "\n", "  \n\n"])
def test_an_empty_file_is_refused(tmp_path, text):
    path = tmp_path / "pairs.txt"
    path.write_text(text)
    with pytest.raises(EvalError, match=r"pairs\.txt"):
        read_int_table(path, 3, "a b c")


def test_blank_lines_at_the_end_are_no_data(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text("1 2 0\n3 4 1\n\n \n")
    assert read_int_table(path, 3, "a b c").tolist() == [[1, 2, 0], [3, 4, 1]]
