"""Limit the size of files, as a full disk does."""

import contextlib
import resource


@contextlib.contextmanager
def largest_file(size):
    """Let the system refuse larger files, as it refuses any on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
