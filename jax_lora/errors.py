"""Exceptions and warnings of jax_lora.

Every message has four parts: where the problem is, what was found, what was expected, and how to
fix it. An error is raised with them, as in `ConfigError(where, got=..., expected=..., fix=...)`.
"""

from __future__ import annotations

from jax_lora.printable import printable


class LoraError(Exception):
    """Base class of the errors that this library raises.

    Messages quote names from files, so control characters in them are escaped.

    Args:
      where: Where the problem is; or, without the other parts, the whole message.
      got: As in `format_error`.
      expected: As in `format_error`.
      fix: As in `format_error`.

    Example:
      >>> print(ConfigError("rank", got=0, expected="an integer above 0", fix="Pass rank=8."))
      rank
        got:      0
        expected: an integer above 0
        fix:      Pass rank=8.
    """

    def __init__(self, where: object, *, got: object = "", expected: str = "", fix: str = ""):
        """Build the message."""
        if expected:
            where = format_error(where, got=got, expected=expected, fix=fix)
        super().__init__(_printable(where))


class ConfigError(LoraError, ValueError):
    """A setting is invalid (rank 0, alpha NaN, an unknown name)."""


class DoesNotFitError(ConfigError):
    """The compiler of a device refuses a training step that needs more memory than it has."""


class NoMatchError(LoraError, ValueError):
    """A pattern of a configuration matches no kernel."""


class AmbiguousKernelError(LoraError, ValueError):
    """The shape of a leaf does not determine which axes are inputs and which are outputs."""


class StructureError(LoraError, ValueError):
    """Two trees do not match (a missing path, a different shape)."""


class MaterializeError(LoraError, RuntimeError):
    """An operation without a low-rank rule uses a `LoraWeight` under `on_materialize="error"`.

    It is also raised, whatever the policy, if the pair has a bias: no weight includes that bias.
    """


class MergeError(LoraError, ValueError):
    """A merge would produce NaN or Inf, or a bias has no leaf to be added to."""


class CheckpointError(LoraError, ValueError):
    """A saved adapter is missing, damaged or inconsistent."""


class BaseMismatchError(CheckpointError):
    """A saved adapter was trained on a different base model."""


class ModelError(LoraError, ValueError):
    """A model folder cannot be read, or needs a feature that is not implemented."""


class AdapterFileError(LoraError, ValueError):
    """An adapter file of another library is damaged, or needs an unimplemented feature."""


class HubError(LoraError, RuntimeError):
    """A name cannot be resolved on the Hugging Face Hub, or a transfer fails."""


class DataError(LoraError, ValueError):
    """An example of a data file is invalid; the message has its `file:line`."""


class LoraWarning(UserWarning):
    """Base class of the warnings of this library; control characters are escaped."""

    def __init__(self, *args: object):
        """Escape the message."""
        super().__init__(*map(_printable, args))


class SkippedKernelWarning(LoraWarning):
    """A targeted matrix is used in a way that cannot be adapted."""


class MergeWarning(LoraWarning):
    """Rounding to the type of the base weight lost a large share of a merged update."""


class CheckpointWarning(LoraWarning):
    """A saved adapter was loaded with a check disabled."""


class AdapterFileWarning(LoraWarning):
    """An adapter file of another library has fields that are not supported."""


class MaterializeWarning(LoraWarning):
    """An operation without a low-rank rule materialized a full weight: correct, but slow."""


def format_error(where: object, *, got: object, expected: str, fix: str) -> str:
    """Build a message in the layout that all messages of this library share.

    Args:
      where: The leaf path, `file:line` or argument that has the problem.
      got: The value found there, or a list of problems, which get a line each.
      expected: A valid value.
      fix: How to fix the problem.

    Returns:
      The message, in which control characters are escaped.

    Example:
      >>> print(format_error("rank", got="0", expected="an integer above 0", fix="Pass rank=8."))
      rank
        got:      0
        expected: an integer above 0
        fix:      Pass rank=8.
    """
    problems = isinstance(got, list | tuple)
    found = "".join(f"\n    {problem}" for problem in got) if problems else got
    message = f"{where}\n  got:      {found}\n  expected: {expected}\n  fix:      {fix}"
    return printable(message)


def install_command(extra: str = "") -> str:
    """Return how to install this package with an extra, for the `fix` of a message.

    Args:
      extra: Name of the extra in `pyproject.toml`; empty: no extra.

    Returns:
      The commands for the published package and for a clone of the repository.

    Example:
      >>> print(install_command("cli"))
      Run: pip install 'jax-lora[cli]' (in a clone of the repository: pip install '.[cli]')
    """
    extras = f"[{extra}]" if extra else ""
    clone = f"in a clone of the repository: pip install '.{extras}'"
    return f"Run: pip install 'jax-lora{extras}' ({clone})"


def _printable(value: object) -> object:
    return printable(value) if isinstance(value, str) else value
