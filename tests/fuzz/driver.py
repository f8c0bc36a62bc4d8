"""What the fuzz targets share: seeds for a new corpus, and the start of libFuzzer."""

import pathlib
import sys

import atheris


def run(one_input, seeds):
    """Fuzz `one_input(bytes)` by the command line's options; an empty corpus directory gets the `seeds` first."""
    for argument in sys.argv[1:]:
        path = pathlib.Path(argument)
        if not argument.startswith("-") and not path.is_file():
            path.mkdir(parents=True, exist_ok=True)
            if not any(path.iterdir()):
                for number, seed in enumerate(seeds):
                    (path / f"seed{number}").write_bytes(seed)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
