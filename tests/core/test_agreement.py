"""Ranks that were started differently, see other files or fail alone: one line, on all of them."""

import socket

import pytest
import torch

from core import agreement, files
from core.agreement import MAY_DIFFER, check_ranks_agree, check_same_start, check_shared, failing_together
from core.config import REPO, load_config
from core.distributed import rank
from core.errors import UserError
from tests.ranks import run_ranks

CONFIGS = [REPO / "configs/base.py", *sorted(REPO.glob("BCT_methods/*/configs/base.py"))]
HOST = socket.gethostname()


def refusal(function, *args, **table):
    try:
        function(*args, **table)
    except (UserError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def _start_with_each_key_changed(path):
    """What is said if rank 1 of three has another value, for each key of the config."""
    said = {}
    for key in load_config(path):
        cfg = load_config(path)
        cfg[key] = 2 if rank() == 1 else 1
        said[key] = refusal(check_same_start, cfg, torch.device("cpu"))
    return said


def _all_configs():
    return [_start_with_each_key_changed(path) for path in CONFIGS]


def test_every_key_of_every_method_that_differs_is_named_on_all_ranks():
    by_rank = run_ranks(_all_configs, 3)
    assert by_rank[0] == by_rank[1] == by_rank[2] and len(CONFIGS) > 6
    differs = (
        f"DisagreementError: rank 1 on {HOST} has {{}} = 2, rank 0 on {HOST} has 1; start all ranks with the same "
    )
    for path, said in zip(CONFIGS, by_rank[0]):
        assert list(said) == list(load_config(path)) and len(said.keys() - MAY_DIFFER) > 30
        for key, line in said.items():
            assert line is None if key in MAY_DIFFER else line.startswith(differs.format(key)), key


def _other(what):
    """Rank 1 has another `what`."""
    cfg, device = load_config("configs/base.py"), torch.device("cpu")
    if rank() == 1:
        device = torch.device("cuda") if what == "device" else device
        torch.__version__ = "1.13" if what == "torch" else torch.__version__
        agreement.code_digest = (lambda: "other") if what == "code" else agreement.code_digest
        cfg.batch_size += 1  # named only if nothing above it differs
    return refusal(check_same_start, cfg, device, force=rank() == 1)


@pytest.mark.parametrize("what", ["code", "torch", "device", "batch_size"])
def test_other_code_comes_before_the_keys_that_it_may_have_brought(what):
    first, second = run_ranks(_other, 2, what)
    assert first == second and first.startswith(f"DisagreementError: rank 1 on {HOST} has {what} = ")


def _files():
    found = [{"records": "1f"}, {"records": "2e"}, {}][rank()]
    same, more = {"records": "1f", "features": None}, {"radii": "2e"} if rank() == 1 else {}
    return [refusal(check_ranks_agree, **facts) for facts in (found, same, more)]


def test_files_are_compared_by_their_digests():
    for differ, same, more in run_ranks(_files, 3):
        assert f"rank 1 on {HOST} has records = '2e', rank 0 on {HOST} has '1f'" in differ and same is None
        assert f"rank 1 on {HOST} has radii = '2e', rank 0 on {HOST} has None" in more


def _fail(which, error):
    with failing_together():
        if rank() in which:
            raise error


def _failures():
    cases = [
        ((1, 2), UserError("no such class")),
        ((0,), PermissionError(13, "Permission denied", "a.rec")),
        ((), None),
    ]
    return [refusal(_fail, *case) for case in cases]


def test_an_error_of_some_ranks_ends_all_of_them():
    denied = "PermissionError: [Errno 13] Permission denied: 'a.rec'"
    assert run_ranks(_failures, 3) == [
        [f"DisagreementError: rank 1 on {HOST} failed: UserError: no such class", denied, None],
        ["UserError: no such class", f"DisagreementError: rank 0 on {HOST} failed: {denied}", None],
        ["UserError: no such class", f"DisagreementError: rank 0 on {HOST} failed: {denied}", None],
    ]


def _shared(folders):
    files.SECONDS_TO_APPEAR = 0
    return refusal(check_shared, folders[rank()], "set `output`")


def test_a_disk_that_some_ranks_do_not_share(tmp_path):
    mine, others, link = tmp_path / "a/b", tmp_path / "c", tmp_path / "link"
    others.mkdir()
    link.symlink_to("a/b")
    lines = run_ranks(_shared, 3, [mine, others, others])
    assert lines == [
        f"DisagreementError: {folder}: not shared, ranks 1, 2 do not see rank 0's files; set `output`"
        for folder in (mine, others, others)
    ]
    assert run_ranks(_shared, 3, [mine, link, mine]) == [None] * 3, "each has its own path to it"
    assert not [*mine.iterdir(), *others.iterdir()]


def test_a_folder_in_which_rank_0_cannot_write_ends_all_ranks(tmp_path):
    (tmp_path / "file").touch()
    lines = run_ranks(_shared, 2, [tmp_path / "file/x"] * 2)
    assert all("Not a directory" in line for line in lines) and "rank 0 on" in lines[1]


def test_the_code_is_the_files_that_a_run_may_execute(tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "REPO", tmp_path)
    found = []
    for name in ("train.py", "tools/x/y.py", "tests/z.py", "dataset/a.py", "core/config.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
        agreement.code_digest.cache_clear()
        found.append(agreement.code_digest())
    agreement.code_digest.cache_clear()
    assert len(set(found[:2])) == 2 and set(found[1:]) == {found[1]}


@pytest.mark.parametrize("room", agreement.ROOMS)
def test_the_rooms_exist(room):
    assert list((agreement.REPO / room).rglob("*.py"))
