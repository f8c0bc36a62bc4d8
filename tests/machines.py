"""Two machines on this one: a copy of the tree and of the data each, under one path where the kernel allows it.

In a mount and a UTS namespace of its own each has another disk at the same place, and another host name. Without the
right to make namespaces, the places differ and both are localhost.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

from tests.ranks import HANGS

REPO = pathlib.Path(__file__).resolve().parents[1]
ROOMS = ("BCT_methods", "backbones", "configs", "core", "engine", "losses", "old_model", "tools")
ENTER = 'mount --bind "$1" "$2" && mount --bind "$3" /etc/hosts && hostname "$4" && cd "$2" && shift 4 && exec "$@"'
NAMESPACES = ["unshare", "--mount", "--uts"] + ["--map-root-user"] * (hasattr(os, "geteuid") and os.geteuid() != 0)


def copy_tree(root):
    """Copy what a run may execute to `root`."""
    ignore = shutil.ignore_patterns("__pycache__", "work_dirs", "feature_save", "IJB_result")
    for name in ROOMS:
        shutil.copytree(REPO / name, root / name, ignore=ignore)
    for path in REPO.glob("*.py"):
        shutil.copy(path, root)


def free_port(ports=(0,)):
    """The first of `ports` that is free; 0 stands for any."""
    for port in ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return probe.getsockname()[1]


def wait_until(condition, *processes):
    """Poll until `condition()` is true; fails if one of the processes has ended by then, or after HANGS seconds."""
    end = time.monotonic() + HANGS
    while not condition():
        ended = [process for process in processes if process.poll() is not None]
        assert (not ended or condition()) and time.monotonic() < end, [process.log.read_text() for process in processes]
        time.sleep(0.02)


class Machine:
    """`disk`: its directory, as the tests see it; `place`: as its processes do; `name`: its host name; `address`."""

    def __init__(self, number, folder):
        self.disk, self.folder = folder / f"disk{number}", folder
        self.namespaces = can_have_namespaces()
        self.name = f"host{number}" if self.namespaces else socket.gethostname()
        self.address = self.name if self.namespaces else "localhost"
        self.place = folder / "repo" if self.namespaces else self.disk
        self.place.mkdir(exist_ok=True)
        self.hosts = folder / "hosts"
        self.hosts.write_text("127.0.0.1 localhost host1\n127.0.0.2 host2\n")

    def start(self, command, **environment):
        """Start the words `command` here, in a process group of its own; `log` of the Popen is what it prints."""
        if self.namespaces:
            command = [*NAMESPACES, "sh", "-ec", ENTER, "enter", self.disk, self.place, self.hosts, self.name, *command]
        path = f"{self.folder / 'bin'}{os.pathsep}{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        usual = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "PATH": path}
        log = self.folder / f"log_{self.disk.name}_{time.monotonic_ns()}"
        with open(log, "w") as file:
            process = subprocess.Popen(
                command,
                cwd=self.disk,
                env={**os.environ, **usual, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process.log = log
        return process


def can_have_namespaces():
    probe = [*NAMESPACES, "sh", "-ec", "mount --bind /etc/hosts /etc/hosts && hostname host1"]
    try:
        return subprocess.run(probe, capture_output=True).returncode == 0
    except OSError:
        return False


def family(pid):
    """The process and all that descend from it: torchrun starts each rank in a session of its own."""
    with contextlib.suppress(OSError):
        yield pid
        for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from family(int(child))


def kill_family(process):
    """SIGKILL, to all of them at once, as when a machine loses its power."""
    for pid in [*family(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def ending(processes):
    """At the end of the block the processes are killed, with those that they started."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                kill_family(process)
