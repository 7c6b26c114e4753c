"""Every exception that jax_lora raises on purpose.

A message answers four questions, in this order: where it happened, what was got, what was
expected, and what to do about it. `format_error` lays those out so that all messages read alike.
"""

from __future__ import annotations


class LoraError(Exception):
    """Base class: `except LoraError` catches all that this library raises on purpose."""


class ConfigError(LoraError, ValueError):
    """A setting has a value that cannot mean anything (rank 0, alpha NaN, an unknown name)."""


class NoMatchError(LoraError, ValueError):
    """A pattern matched no kernel, so nothing would have been trained."""


class AmbiguousKernelError(LoraError, ValueError):
    """The shape of a leaf alone cannot tell which of its axes are inputs and which outputs."""


class StructureError(LoraError, ValueError):
    """Two trees that must fit together do not (a missing path, another shape)."""


class MaterializeError(LoraError, RuntimeError):
    """An operation without a low-rank rule met a `LoraWeight` under `on_materialize="error"`.

    Also, whatever the policy, one whose pair has a bias: no weight could stand for it.
    """


class MergeError(LoraError, ValueError):
    """Merging would have put a non-finite number into the base model."""


class CheckpointError(LoraError, ValueError):
    """A saved adapter is missing, damaged, or does not hold what it says."""


class BaseMismatchError(CheckpointError):
    """A saved adapter was trained on another base model."""


class ModelError(LoraError, ValueError):
    """A model folder cannot be read, or asks for something that is not implemented."""


class AdapterFileError(LoraError, ValueError):
    """A file of another library's adapter is broken, or asks for what is not implemented."""


class DataError(LoraError, ValueError):
    """A row of a data file cannot be used; the message carries `file:line`."""


class SkippedKernelWarning(UserWarning):
    """A target is a matrix that the function uses in a way that no adapter can reach."""


class MergeWarning(UserWarning):
    """A merge rounded a large share of the update away."""


class CheckpointWarning(UserWarning):
    """A saved adapter was loaded although a check that guards it was switched off."""


class AdapterFileWarning(UserWarning):
    """A file of another library's adapter says something that could not be understood."""


class MaterializeWarning(UserWarning):
    """An operation without a low-rank rule formed a full weight: right, but slow."""


def format_error(where: str, *, got: str, expected: str, fix: str) -> str:
    """Lay a message out as where / got / expected / what to do.

    Args:
      where: The leaf path, `file:line`, or argument at fault.
      got: What was found there.
      expected: What would have been right.
      fix: The next thing for the reader to do.

    Returns:
      A message of four lines.

    Example:
      >>> print(format_error("rank", got="0", expected="an integer above 0", fix="Pass rank=8."))
      rank
        got:      0
        expected: an integer above 0
        fix:      Pass rank=8.
    """
    return f"{where}\n  got:      {got}\n  expected: {expected}\n  fix:      {fix}"
