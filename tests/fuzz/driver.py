"""What the fuzz targets share: seeds for a new corpus, a limit on memory, and the start of libFuzzer."""

import pathlib
import resource
import sys

import atheris

MOST_MEMORY = 64  # MiB that the process may grow by in one input


def run(one_input, seeds):
    """Fuzz `one_input(bytes)` by the command line's options; an empty corpus directory gets the `seeds` first.

    Memory is watched here, for each input: libFuzzer's -rss_limit_mb counts, too, what atheris itself holds on to (the
    result of every comparison of NumPy arrays that it instruments, some 5 KB an input of fuzz_recordio.py).
    """
    for argument in sys.argv[1:]:
        path = pathlib.Path(argument)
        if not argument.startswith("-") and not path.is_file():
            path.mkdir(parents=True, exist_ok=True)
            if not any(path.iterdir()):
                for number, seed in enumerate(seeds):
                    (path / f"seed{number}").write_bytes(seed)

    def watched(data):
        before = peak()
        one_input(data)
        assert peak() - before <= MOST_MEMORY, f"took {peak() - before} MiB"

    atheris.Setup([*sys.argv, "-rss_limit_mb=0"], watched)
    atheris.Fuzz()


def peak():
    """MiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
