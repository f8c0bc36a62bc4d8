"""Ranks of a job that `srun` started without torchrun: Slurm's variables in torch's names."""

import os
import re

from core.errors import UserError

# Variables with which MPI launchers, which set no RANK, number their processes.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE")


class SchedulerError(UserError):
    """Processes that were started as one job and cannot find each other."""


def adopt_ranks(environ=os.environ):
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in a Slurm step of several tasks.

    What is set stays. SLURM_STEP_NUM_TASKS counts the tasks of this very srun; SLURM_NTASKS is in batch scripts, too,
    where a single process must stay single. Raises SchedulerError under an MPI launcher.
    """
    if "RANK" in environ:
        return
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1:
        environ["RANK"], environ["WORLD_SIZE"] = environ["SLURM_PROCID"], str(tasks)
        environ.setdefault("LOCAL_RANK", environ["SLURM_LOCALID"])
        environ.setdefault("LOCAL_WORLD_SIZE", tasks_of_node(environ))
        environ.setdefault("MASTER_ADDR", first_host(environ["SLURM_STEP_NODELIST"]))
        # The same on all nodes, below the range of ports that the system hands out.
        environ.setdefault("MASTER_PORT", str(20000 + int(environ["SLURM_JOB_ID"]) % 12000))
        return
    for name in _MPI_SIZES:
        if int(environ.get(name, 1)) > 1:
            raise SchedulerError(
                f"{name} = {environ[name]}, but there is no RANK: each process would train on its own. Start one "
                "process per machine, torchrun: mpirun --map-by ppr:1:node torchrun --nnodes=N --nproc_per_node=GPUS "
                "--rdzv_backend=c10d --rdzv_endpoint=FIRST_HOST:29500 train.py CONFIG"
            )


def first_host(nodes):
    """The first host of a Slurm node list: `gpu[03-05,09],login1` -> `gpu03`."""
    prefix, bracket, rest = nodes.partition("[") if "[" in nodes.split(",")[0] else (nodes.split(",")[0], "", "")
    if not bracket:
        return prefix
    numbers, _, suffix = rest.partition("]")
    return prefix + re.split("[-,]", numbers)[0] + suffix.partition(",")[0]


def tasks_of_node(environ):
    """This node's number of tasks, from SLURM_STEP_TASKS_PER_NODE such as `4(x2),3`: 4, 4 and 3."""
    counts = []
    for entry in environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, nodes = entry.partition("(x")
        counts += [count] * int(nodes.rstrip(")") or 1)
    return counts[int(environ.get("SLURM_NODEID", 0))]
