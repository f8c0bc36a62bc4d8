"""Two machines, each with a disk, a copy of the tree and a torchrun of its own: `make test-cluster`.

The commands are those of docs/cluster.md as they stand there, with one rank a machine and this test's port. Slurm and
mpirun are stand-ins on PATH that start the command on both machines with the variables that the real ones set.
"""

import contextlib
import itertools
import os
import re
import shlex
import shutil
import signal
import sys

import pytest
import torch

from engine import checkpoint
from tests.BCT_methods.whole_runs import sets_of
from tests.conftest import draw_record_set
from tests.machines import REPO, Machine, copy_tree, ending, family, free_port, kill_family, wait_until
from tests.ranks import HANGS

LABELS = [row % 6 for row in range(48)]  # 6 steps an epoch
SCALE = "--network tiny --num_epoch 2 --batch_size 4 --num_workers 0 --checkpoint_steps 4 --frequent 1"
PARTS = ("train_part_30_class.rec", "train_part_70_class.rec")
DATA, OLD = "dataset/ms1m-retinaface-t1", "f512_r18_arc_class30"
RESUME, RESUME_WORDS = "start it as before on every machine, with --resume True", ["--resume", "True"]
WAITING = """
import os, time
import train_old_arc

class OldArc(train_old_arc.OldArc):
    def update(self):
        super().update()
        if "WAITS" in os.environ and self.step == 5:
            open("waits", "w").close()
            agent = os.getppid()
            while not self.stop.received and os.getppid() == agent:
                time.sleep(0.01)

if __name__ == "__main__":
    OldArc.main()
"""
STAND_IN = f"""#!{sys.executable}
import pathlib, sys
sys.path.insert(0, {str(REPO)!r})
from tests.cluster import stand_in
path = pathlib.Path(sys.argv[0])
sys.exit(stand_in(path.name, sys.argv[1:], path.parents[1]))
"""


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """host1 and host2. `work_dirs` is a disk that both mount, all else is each machine's own."""
    folder = tmp_path_factory.mktemp("cluster")
    first, second = machines = [Machine(number, folder) for number in (1, 2)]
    copy_tree(first.disk)
    (first.disk / "waiting.py").write_text(WAITING)
    data = first.disk / DATA
    data.mkdir(parents=True)
    for part in PARTS:
        draw_record_set(data / part, LABELS)
    (folder / "shared").mkdir()
    (first.disk / "work_dirs").symlink_to(folder / "shared")
    shutil.copytree(first.disk, second.disk, symlinks=True, dirs_exist_ok=True)
    (folder / "bin").mkdir()
    for name in ("srun", "scontrol", "mpirun"):
        (folder / "bin" / name).write_text(STAND_IN)
        (folder / "bin" / name).chmod(0o755)
    return machines


def page():
    """The blocks of docs/cluster.md by the first word of their command: c10d and static for torchrun's two."""
    blocks = re.findall(r"```\n(.*?)```", (REPO / "docs/cluster.md").read_text(encoding="utf-8"), re.S)
    c10d, static, sbatch, srun, mpirun = (block.strip() for block in blocks)
    assert (
        "c10d" in c10d and "--node_rank=0" in static and sbatch.startswith("#!") and srun.startswith("srun --nodes=2")
    )
    kinds = {"c10d": c10d, "static": static, "sbatch": sbatch, "srun": srun, "mpirun": mpirun}
    return {**kinds, "once": c10d.replace(" --max-restarts=3", "")}  # of an error, one line


def at_this_scale(command, machines, port, first=0):
    """One rank a machine, a free port, the first machine's address."""
    command = re.sub("(?<=per.node=)8", "1", command).replace("29500", str(port))
    return re.sub("(?<==)host1", machines[first].address, command)


def start_on_both(machines, kind, *words, first=0, script=None, waits=None, keys=""):
    """Start the page's `kind` of torchrun, with more `words`, on both machines; rank 0 of "static" is on the `first`.

    script: in place of the page's, with its config. waits: the number of a machine whose rank waits after step 5 until
    it is stopped. keys: more BCT_OVERRIDES.
    """
    command = at_this_scale(page()[kind], machines, free_port(), first)
    command = command.replace("train_old_arc.py", script or "train_old_arc.py")
    processes = []
    for number, machine in enumerate(machines):
        own = command.replace("--node_rank=0", f"--node_rank={number ^ first}")
        environment = {"WAITS": "1"} if number == waits else {}
        processes.append(machine.start([*shlex.split(own), *words], BCT_OVERRIDES=f"{SCALE} {keys}", **environment))
    return processes


def ends_of(processes):
    """`[(exit code, what it printed)]` once all have ended."""
    with ending(processes):
        wait_until(lambda: all(process.poll() is not None for process in processes))
    return [(process.returncode, process.log.read_text()) for process in processes]


def assert_same_end(one, other):
    for name in ("model.pt", "softmax_fc_gpu_0.pt", "softmax_fc_gpu_1.pt"):
        first, second = checkpoint.load(one / name), checkpoint.load(other / name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name


@pytest.fixture(scope="module")
def whole(machines):
    """The output of an undisturbed run, by the page's first command."""
    ends = ends_of(start_on_both(machines, "c10d"))
    assert [code for code, _ in ends] == [0, 0], ends
    output = machines[0].disk / "work_dirs" / OLD
    assert "2 ranks on cpu" in (output / "training.log").read_text() and sets_of(output)[-1] == (12, 2)
    return output


# --- stops and restarts ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def disturbed(machines, disturb, kind, name, number=1):
    """A run on whose torchrun of machine `number` `disturb` is called after step 5; in the block no rank runs."""
    waits = machines[number].disk / "waits"
    processes = start_on_both(machines, kind, script="waiting.py", waits=number, keys=f"--output work_dirs/{name}")
    with ending(processes):
        wait_until(waits.exists, *processes)
        waits.unlink()
        disturb(processes[number])
        # torchrun itself waits for the other one, up to five minutes
        wait_until(lambda: processes[number].poll() is not None and not [*family(processes[1 - number].pid)][1:])
        yield processes


def log_of(processes):
    """What both machines print; rank 0, which tells most, may be on either."""
    return "".join(process.log.read_text() for process in processes)


def test_sighup_on_one_machine_and_a_resume_with_the_machines_swapped(machines, whole):
    """Static: the second time rank 0 is on host2."""
    output = machines[0].disk / "work_dirs/swapped"
    with disturbed(machines, lambda torchrun: torchrun.send_signal(signal.SIGHUP), "static", output.name) as processes:
        assert processes[1].returncode == 1
        assert f"stopped by SIGHUP at step 5; resume with: {RESUME}" in processes[0].log.read_text()
    assert sets_of(output) == [(4, 2), (5, 2)]
    ends = ends_of(start_on_both(machines, "static", *RESUME_WORDS, first=1, keys=f"--output work_dirs/{output.name}"))
    assert [code for code, _ in ends] == [0, 0] and "epoch 0, step 5" in ends[1][1], ends
    assert_same_end(whole, output)


@pytest.mark.parametrize(
    "disturb, told, code",
    [
        (lambda torchrun: torchrun.send_signal(signal.SIGINT), "SIGINT", 1),
        (lambda torchrun: torchrun.send_signal(signal.SIGUSR1), "the end of torchrun", -signal.SIGUSR1),
    ],
    ids=["Ctrl-C", "orphan"],
)
def test_one_machine_stops_both(machines, disturb, told, code):
    output = machines[0].disk / "work_dirs" / told.split()[-1]
    with disturbed(machines, disturb, "once", output.name) as processes:
        assert processes[1].returncode == code
        assert f"stopped by {told} at step 5; resume with: {RESUME}" in log_of(processes)
    assert sets_of(output) == [(4, 2), (5, 2)]


def test_a_machine_that_loses_its_power(machines):
    output = machines[0].disk / "work_dirs/lost"
    with disturbed(machines, kill_family, "once", output.name) as processes:
        assert processes[0].wait(HANGS) == 1
        told = errors_in(processes[0].log.read_text())
    form = r"LostRank: step 5: no answer from another rank in .*; the launcher's log on each machine names the rank .*"
    assert len(told) == 1 and re.fullmatch(form, told[0]), told
    assert sets_of(output) == [(4, 2)]


def errors_in(log):
    """The errors of the ranks, without "[rank r] "; fails if one is a traceback of this repo's."""
    assert "engine/" not in "".join(re.findall(r'File "(.*)"', log)), log
    return re.findall(r"^\[rank \d\] (.*)", log, re.M)


# --- machines that differ -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def another(path, write):
    """`path` as `write(path)` makes it; it comes back at the end of the block."""
    kept = path.read_bytes()
    write(path)
    try:
        yield
    finally:
        path.write_bytes(kept)


def test_another_commit_on_one_machine(machines):
    with another(machines[1].disk / "core/scheduler.py", lambda path: path.write_text(path.read_text() + "# more\n")):
        assert_refused(machines, start_on_both(machines, "once", keys="--output work_dirs/no"), "code")


def test_other_images_in_one_machines_record_file(machines):
    """Of the same counts; its index stays, as every image has its old size: the records alone are other ones."""
    with another(machines[1].disk / DATA / PARTS[0], change_one_pixel):
        assert_refused(machines, start_on_both(machines, "once", keys="--output work_dirs/no"), "records")


def change_one_pixel(rec):
    content = bytearray(rec.read_bytes())
    content[len(content) // 2] ^= 1
    rec.write_bytes(content)


def test_another_value_on_one_machines_command_line(machines):
    command = at_this_scale(page()["once"], machines, free_port())
    keys = f"{SCALE} --output work_dirs/no"
    processes = [
        machine.start([*shlex.split(command), *words], BCT_OVERRIDES=keys)
        for machine, words in zip(machines, ([], ["--seed", "7"]))
    ]
    assert_refused(machines, processes, "seed")


def assert_refused(machines, processes, key):
    """Both machines end with one and the same line, before anything is written."""
    ends = ends_of(processes)
    lines = [errors_in(log) for _, log in ends]
    assert [code for code, _ in ends] == [1, 1] and lines[0] == lines[1] and len(lines[0]) == 1, ends
    here, there = (re.escape(machine.name) for machine in machines)
    told = (
        rf"DisagreementError: rank 1 on ({here}|{there}) has {key} = (.*), rank 0 on ({here}|{there}) has (.*); start "
    )
    found = re.match(told, lines[0][0])
    assert found and found[2] != found[4], lines
    assert found[1] != found[3] or not machines[0].namespaces
    assert not (machines[0].disk / "work_dirs/no").exists()


def test_features_for_a_disk_that_is_not_shared(machines, whole):
    script = "tools/get_feature/get_feature.py"
    ends = ends_of(start_on_both(machines, "once", "--SD", "f512_r18_arc_class70", script=script))
    lines = [errors_in(log) for _, log in ends]
    told = "feature_save/OPclass: not shared, ranks 1 do not see rank 0's files; set --feature_save to a directory"
    assert [code for code, _ in ends] == [1, 1] and [len(its) for its in lines] == [1, 1], ends
    assert all(told in its[0] for its in lines), lines
    written = [path.name for machine in machines for path in (machine.disk / "feature_save").rglob("*")]
    assert sorted(written) == [".f512_r18_arc_class70.lock", "OPclass"]


# --- schedulers -----------------------------------------------------------------------------------------------------


def stand_in(name, words, folder):
    """srun and mpirun: start the command on both machines, with the variables that the real ones set.

    scontrol: the host names of a node list.
    """
    machines = [Machine(number, folder) for number in (1, 2)]
    if name == "scontrol":
        print("\n".join(machine.address for machine in machines))
        return 0
    command = list(itertools.dropwhile(lambda word: word.startswith("-") or word == "ppr:1:node", words))
    processes = []
    for number, machine in enumerate(machines):
        variables = {"OMPI_COMM_WORLD_SIZE": 2, "OMPI_COMM_WORLD_RANK": number}
        if name == "srun":
            variables = {"SLURM_STEP_NUM_TASKS": 2, "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": number}
            variables |= {"SLURM_LOCALID": 0, "SLURM_NODEID": number}
            variables["SLURM_STEP_NODELIST"] = "host[1-2]" if machine.namespaces else machine.address
        processes.append(machine.start(command, **{key: str(value) for key, value in variables.items()}))
    ends = ends_of(processes)
    print(*(log for _, log in ends), sep="\n")
    return max(code for code, _ in ends)


@pytest.mark.parametrize("kind", ["sbatch", "srun", "mpirun"])
def test_schedulers(machines, kind):
    port = free_port(range(20000 + os.getpid() % 6000, 32000))  # as core/scheduler.py makes it of the job's id
    script = at_this_scale(page()[kind], machines, port)
    output = machines[0].disk / "work_dirs" / kind
    environment = {"SLURM_JOB_ID": str(port - 20000), "SLURM_JOB_NODELIST": "host[1-2]", "SLURM_NTASKS": "2"}
    environment["BCT_OVERRIDES"] = f"{SCALE} --output work_dirs/{kind}"
    ends = ends_of([machines[0].start(["bash", "-ec", script], **environment)])
    assert ends[0][0] == 0 and "2 ranks on cpu" in ends[0][1], ends
    assert sets_of(output)[-1] == (12, 2)
