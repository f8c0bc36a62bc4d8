"""Ranks from the variables that Slurm and MPI launchers set; stand-ins for srun, of which there is none here."""

import os
import socket
import subprocess
import sys

import pytest

from core.config import REPO
from core.scheduler import SchedulerError, adopt_ranks, first_host, tasks_of_node

STEP = {
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_STEP_NODELIST": "gpu[03-05,09]",
    "SLURM_JOB_ID": "7012345",
    "SLURM_PROCID": "8",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
}


def test_a_step_of_several_tasks_sets_torchs_names():
    environ = dict(STEP)
    adopt_ranks(environ)
    assert {key: environ[key] for key in environ.keys() - STEP.keys()} == {
        "RANK": "8",
        "WORLD_SIZE": "11",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "24345",
    }


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {**STEP, "RANK": "3"},  # torchrun under srun
        {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"},  # a single process in a batch script
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"OMPI_COMM_WORLD_SIZE": "4", "RANK": "0"},
    ],
)
def test_otherwise_nothing_is_set(environ):
    before = dict(environ)
    adopt_ranks(environ)
    assert environ == before


def test_an_address_of_the_users_own_stays():
    environ = {**STEP, "MASTER_ADDR": "ib-gpu03", "MASTER_PORT": "4711"}
    adopt_ranks(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("ib-gpu03", "4711")


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE"])
def test_mpi_without_ranks_is_told_to_start_torchrun(name):
    with pytest.raises(SchedulerError, match=f"{name} = 4, but there is no RANK.*mpirun .* torchrun --nnodes"):
        adopt_ranks({name: "4"})


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("gpu03", "gpu03"),
        ("gpu[03-05,09]", "gpu03"),
        ("gpu[7,9]", "gpu7"),
        ("login1,gpu[03-05]", "login1"),
        ("rack2-[11-12]-ib,x", "rack2-11-ib"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


def test_tasks_of_each_node():
    assert [tasks_of_node({**STEP, "SLURM_NODEID": str(node)}) for node in range(3)] == ["4", "4", "3"]
    assert tasks_of_node({"SLURM_STEP_TASKS_PER_NODE": "2"}) == "2"


def test_two_tasks_find_each_other():
    code = "from core import distributed as d; import torch; d.init_distributed(); t = torch.ones(1)\n"
    code += "print(d.rank(), d.world_size(), int(d.all_reduce_(t)), flush=True); d.shutdown()"
    with socket.socket() as probe:
        for job in range(os.getpid(), os.getpid() + 12000):
            try:
                probe.bind(("127.0.0.1", 20000 + job % 12000))
                break
            except OSError:
                continue
    step = {**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_JOB_ID": str(job)}
    step |= {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_LOCALID": "0", "CUDA_VISIBLE_DEVICES": ""}
    usual = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=REPO,
            env={**usual, **step, "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=120)[0].split() for rank in ranks] == [["0", "2", "2"], ["1", "2", "2"]]
