"""Read and format sizes, counts and durations."""

from __future__ import annotations

import re

from jax_lora.errors import ConfigError

_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
    "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
}  # fmt: skip


def read_bytes(text: str) -> int:
    """Parse a size in bytes (no unit), GB, MB (powers of ten), GiB or MiB (powers of two).

    Raises:
      ConfigError: The text is not a positive size.

    Example:
      >>> read_bytes("24GB"), read_bytes("1.5 GiB"), read_bytes("512")
      (24000000000, 1610612736, 512)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise ConfigError(
            "--fit",
            got=repr(text),
            expected="a positive size, such as 24GB, 16GiB, 800MB or a number of bytes",
            fix="GB is 10^9 bytes, GiB is 2^30 bytes.",
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def show_bytes(count: float) -> str:
    """Format a size in powers of ten.

    Example:
      >>> show_bytes(37_748_736), show_bytes(350e9), show_bytes(512)
      ('37.7 MB', '350 GB', '512 B')
    """
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"))


def show_count(count: float) -> str:
    """Format a number of parameters or operations in powers of ten.

    Example:
      >>> show_count(18_874_368), show_count(175e9), show_count(12)
      ('18.9 M', '175 G', '12')
    """
    return _scaled(count, ("", "k", "M", "G", "T", "P", "E", "Z", "Y")).rstrip()


def show_seconds(seconds: float) -> str:
    """Format a duration in seconds, minutes, hours, days or years.

    Example:
      >>> show_seconds(0.25), show_seconds(90), show_seconds(7200), show_seconds(4e9)
      ('0.25 s', '1.5 min', '2 h', '127 years')
    """
    for unit, name in ((365 * 86400, "years"), (86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            many = seconds >= 100 * unit
            return f"{seconds / unit:,.0f} {name}" if many else f"{seconds / unit:.3g} {name}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _scaled(count: float, names: tuple[str, ...]) -> str:
    power = 0
    # 999.6 would be formatted as 1e+03.
    while count / 1000**power >= 999.5 and power < len(names) - 1:
        power += 1
    scaled = count / 1000**power
    shown = f"{scaled:.0f}" if power == 0 or scaled >= 99.95 else f"{scaled:.3g}"
    return f"{shown} {names[power]}"
