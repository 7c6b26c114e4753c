"""Mutate files, and fail on anything but a LoraError, or on a reader that takes too long.

python -m tests.attacks.fuzz --seconds 20 [--reader NAME] [--seed N]
"""

import argparse
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from random import Random

from jax_lora.errors import LoraError
from tests.attacks.mutations import mutate_bytes, mutate_json
from tests.attacks.readers import READERS, Reader

MOST_SECONDS = 5.0  # of the processors, for one file
MOST_WAIT = 60.0  # seconds, on a machine with other work


class FuzzError(AssertionError):
    """A reader raised something else than a `LoraError`, or took too long."""


def fuzz(name: str, seconds: float, seed: int = 0) -> int:
    """Attack a reader for some time.

    Args:
      name: A name of `READERS`.
      seconds: How long.
      seed: Chooses the mutations; the same seed gives the same ones in the same order.

    Returns:
      How many mutations were tried.

    Raises:
      FuzzError: A mutation that the reader does not refuse as it should.
    """
    reader, random = READERS[name], Random(f"{name} {seed}")
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / "files"
        reader.make(folder)
        reader.read(folder)  # the files are accepted, and functions are compiled
        whole = {file: (folder / file).read_bytes() for file in reader.files}
        end, tried = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            file = random.choice(reader.files)
            data = mutated(reader, random, whole[file])
            tried += 1
            (folder / file).write_bytes(data)
            if problem := attack(reader, folder):
                raise FuzzError(f"{name}, seed {seed}, mutation {tried}: {file}: {problem}\n{data}")
            (folder / file).write_bytes(whole[file])
    return tried


def mutated(reader: Reader, random: Random, data: bytes) -> bytes:
    """Return a mutation of a file."""
    if reader.binary or random.random() < 0.3:
        return reader.repair(mutate_bytes(random, data))
    return reader.repair(mutate_json(random, data))


def attack(reader: Reader, folder: Path) -> str | None:
    """Read a folder, and say what is wrong with how the reader ends."""
    start = clocks()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(folder)
    except LoraError:
        pass
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of Rust is a BaseException
        return f"{type(error).__name__}: {str(error)[:300]}"
    return too_slow(start)


def clocks() -> tuple[float, float]:
    """Return the processor time of this process and its children, and the time of day."""
    return sum(os.times()[:4]), time.monotonic()


def too_slow(start: tuple[float, float]) -> str | None:
    """Say how long it took since `start`, from `clocks`, if that is too long."""
    used, took = (now - then for now, then in zip(clocks(), start, strict=True))
    slow = used > MOST_SECONDS or took > MOST_WAIT
    return f"took {took:.1f} s, {used:.1f} s of the processors" if slow else None


def main() -> int:
    """Attack one reader or all of them, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each reader [20]")
    parser.add_argument("--reader", choices=READERS, help="one reader [all]")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations [0]")
    options = parser.parse_args()
    failed = 0
    for name in [options.reader] if options.reader else READERS:
        try:
            print(f"{name}: {fuzz(name, options.seconds, options.seed)} mutations", flush=True)
        except FuzzError as error:
            failed += 1
            print(f"{name}: {error}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
