"""A run's directory: who may write there, what a new run may replace, what a restart goes on with."""

import json
import multiprocessing
import os
import socket

import pytest

from core import files
from core.distributed import rank
from core.errors import UserError
from engine import checkpoint
from engine.checkpoint import DAMAGED, claim, complete_sets, continues, sign, start_afresh
from tests.engine.test_checkpoint import TOTAL, names, write_set
from tests.ranks import run_ranks

SETTINGS = {"method": "A", "lr": 0.1}


def refusal(function, *arguments):
    try:
        function(*arguments)
    except UserError as error:
        return str(error)


def test_all_ranks_refuse_to_overwrite_an_unfinished_run(tmp_path):
    write_set(tmp_path, 5, 2)
    for said in run_ranks(refusal, 2, start_afresh, tmp_path, SETTINGS):
        assert "unfinished run (step 5 of 99); resume it with --resume True" in said
    (complete_sets(tmp_path)[0] / "DONE").write_text("")
    assert "DONE: damaged" in refusal(start_afresh, tmp_path, SETTINGS) and len(names(tmp_path)) == 3
    assert run_ranks(refusal, 2, start_afresh, tmp_path, SETTINGS, True) == [None] * 2
    assert not names(tmp_path)


def test_checkpoints_of_a_finished_run_are_deleted(tmp_path):
    write_set(tmp_path, TOTAL, 2)
    folder = write_set(tmp_path, 50, 1)
    folder.rename(folder.with_name(DAMAGED + folder.name))
    sign(tmp_path, SETTINGS)
    for said in run_ranks(refusal, 3, start_afresh, tmp_path, {**SETTINGS, "lr": 0.2}):
        assert said.startswith(f"{tmp_path}: has a run with lr = 0.1, this one has 0.2;")
    assert run_ranks(refusal, 3, start_afresh, tmp_path, {**SETTINGS, "new_key": 1}) == [None] * 3
    assert names(tmp_path) == ["run.json"]


@pytest.mark.parametrize("signed", [None, "", "[]"])
def test_a_finished_run_of_unknown_values_is_not_replaced(tmp_path, signed):
    (tmp_path / "model.pt").touch()
    if signed is not None:
        (tmp_path / "run.json").write_text(signed)
    said = refusal(start_afresh, tmp_path, SETTINGS)
    assert "method and values are unknown, for want of run.json" in said and "--overwrite True" in said
    assert refusal(start_afresh, tmp_path, SETTINGS, True) is None


def claimed(output):
    if not output.exists():
        output = output.with_name(str(rank()))
    files.SECONDS_TO_APPEAR = 0
    return refusal(claim, output)


def test_an_unshared_disk_is_detected_at_the_start(tmp_path):
    for message in run_ranks(claimed, 3, tmp_path / "nowhere"):
        assert "ranks 1, 2 do not see rank 0's files; set `output`" in message
    assert not list(tmp_path.iterdir())
    (tmp_path / "0").mkdir()
    run_ranks(claimed, 2, tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["0"], "it was there before"
    assert run_ranks(claimed, 2, tmp_path) == [None, None]


def hold(output, ready, end):
    lock = claim(output)
    ready.set()
    end.wait(60)
    del lock


def test_two_runs_cannot_share_an_output(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, end = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, end))
    other.start()
    assert ready.wait(60)
    for message in run_ranks(claimed, 2, tmp_path):
        assert "held by process" in message and "choose another `output`" in message
    other.kill()
    other.join()
    assert run_ranks(claimed, 1, tmp_path) == [None]


def test_checkpoints_of_an_earlier_version_are_named_and_kept(tmp_path):
    for number in range(2):
        (tmp_path / f"checkpoint_step_5_gpu_{number}_of_2.pt").write_bytes(b"never opened")
    for message in run_ranks(claimed, 2, tmp_path):
        assert message.startswith(f"{tmp_path}/checkpoint_step_5_gpu_0_of_2.pt: written by an earlier version")
        assert f"delete {tmp_path}/checkpoint_step_*.pt" in message
    assert len(list(tmp_path.glob("checkpoint_step_*"))) == 2


# --- whose run it is -------------------------------------------------------------------------------------------------


def test_an_agent_is_the_parent_of_the_rank_with_its_start_time(monkeypatch):
    assert checkpoint._agent() == "", "not started by torchrun"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    fields = [f"field{number}" for number in range(3, 53)]
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: f"{path.parts[2]} (a) S b) {' '.join(fields)}\n")
    assert checkpoint._agent() == f"{socket.gethostname()} {os.getppid()} field22"


OTHERS = "elsewhere 4711 1234567"


@pytest.mark.parametrize(
    "signed_by, step, restarted, overwrite, expected",
    [
        ("us", None, True, True, True),  # nothing saved yet
        ("us", 5, False, False, True),  # another node has joined: torchrun does not count that
        ("us", TOTAL, True, False, True),  # died after its last step
        ("others", TOTAL, True, False, False),  # a finished run is no part of this one
        ("others", 5, False, False, False),
        ("others", 5, True, False, True),  # this launch, if a wrapper hides its agent
        ("others", 5, True, True, False),
        ("nobody", None, True, False, False),
        ("nobody", TOTAL, True, False, False),
        ("nobody", 5, True, False, True),
    ],
)
def test_a_restart_goes_on_with_what_its_launch_began(
    tmp_path, monkeypatch, signed_by, step, restarted, overwrite, expected
):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    if signed_by != "nobody":
        sign(tmp_path, SETTINGS)
        signed = json.loads((tmp_path / "run.json").read_text())
        (us,) = signed["launch"]
        another = f"{us}0"  # of the same host and pid, but started at another time
        signed["launch"] = [OTHERS, us if signed_by == "us" else another]
        (tmp_path / "run.json").write_text(json.dumps(signed))
    if step:
        write_set(tmp_path, step, 1)
    assert continues(tmp_path, restarted, overwrite) is expected


def sign_and_ask(output):
    """This rank's agent would be the same as the others'; as on two machines, rank 0's is its own."""
    if rank() == 0:
        checkpoint._agent = lambda: OTHERS
    before = continues(output, True, False)
    sign(output, SETTINGS)
    return before, continues(output, False, False)


def test_all_ranks_know_whether_to_go_on(tmp_path):
    assert run_ranks(sign_and_ask, 2, tmp_path, env={"TORCHELASTIC_RUN_ID": "none"}) == [(False, True)] * 2
    signed = json.loads((tmp_path / "run.json").read_text())
    assert signed.items() >= SETTINGS.items() and OTHERS in signed["launch"] and len(signed["launch"]) == 2


def test_rank_0_decides_where_a_slow_disk_shows_the_others_less(tmp_path, monkeypatch):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "run.json").write_text(json.dumps({"launch": [OTHERS]}))
    monkeypatch.setattr(checkpoint, "_agent", lambda: OTHERS)
    assert [continues(tmp_path / name, False, False) for name in "01"] == [True, False]
    assert run_ranks(ask_in_own_folder, 2, tmp_path) == [True, True]


def ask_in_own_folder(output):
    checkpoint._agent = lambda: OTHERS
    return continues(output / str(rank()), False, False)
