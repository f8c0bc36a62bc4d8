"""Ranks that were started with different values stop in one line, all of them."""

import socket

import pytest
import torch

from core import agreement
from core.agreement import MAY_DIFFER, DisagreementError, check_ranks_agree
from core.config import load_config
from tests.ranks import run_ranks

KEYS = [key for key in load_config("configs/base.py") if key not in MAY_DIFFER]
FREE = [key for key in load_config("configs/base.py") if key in MAY_DIFFER]


def _compare(key, everywhere, on_one):
    """What a rank of three says if rank 1 has another value."""
    cfg, facts = load_config("configs/base.py"), {}
    value = on_one if torch.distributed.get_rank() == 1 else everywhere
    if key in cfg:
        cfg[key] = value
    elif value is not None:  # another version of the code may not have the entry at all
        facts[key] = value
    try:
        check_ranks_agree(cfg, torch.device("cpu"), **facts)
    except DisagreementError as error:
        return str(error)


def _compare_each(cases):
    return [_compare(*case) for case in cases]


def test_every_key_and_fact_that_differs_is_named_on_all_ranks():
    cases = [(key, 1, 2) for key in KEYS] + [(key, 1, 2) for key in FREE]
    cases += [("records", "1f", "2e"), ("records", "1f", "1f"), ("old_embedding", "1f", None), ("radii", None, "2e")]
    by_rank = run_ranks(_compare_each, 3, cases)
    assert by_rank[0] == by_rank[1] == by_rank[2] and len(KEYS) > 30
    host = socket.gethostname()
    for (key, everywhere, on_one), said in zip(cases, by_rank[0]):
        if key in FREE or everywhere == on_one:
            assert said is None
        else:
            expected = f"rank 1 on {host} has {key} = {on_one!r}, rank 0 on {host} has {everywhere!r}; start all ranks"
            assert said.startswith(expected)


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
