"""Import `huggingface_hub`, and convert its errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from jax_lora.errors import HubError, install_command
from jax_lora.hub.hub_name import HubName

_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
LOGIN = "hf auth login, or set HF_TOKEN"
_FOUND = "a local folder, or the name of a repository on the Hub: owner/name[@revision]"


def hub_library(name: HubName) -> Any:
    """Import `huggingface_hub` to look up a name.

    Raises:
      HubError: It is not installed.
    """
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        got = "no such local folder, and the package huggingface_hub is not installed"
        expected = "a local folder, or the package that downloads from the Hub"
        fix = f"Check the path, or install the extra. {install_command('hub')}"
        raise HubError(name, got=got, expected=expected, fix=fix) from error
    return huggingface_hub


def transfer_line(name: HubName, verb: str, sizes: Sequence[int]) -> str:
    """Say in one line which transfer starts: of how many files, and of how many bytes.

    Example:
      >>> transfer_line(HubName("owner/name"), "downloading", [1_500_000_000, 20])
      'owner/name: downloading 2 files, 1.5 GB'
    """
    total = float(sum(sizes))
    unit = next((unit for unit in ("GB", "MB") if total >= _UNITS[unit]), "kB")
    return f"{name}: {verb} {len(sizes)} files, {total / _UNITS[unit]:.3g} {unit}"


@contextlib.contextmanager
def hub_errors(name: HubName) -> Iterator[None]:
    """Convert the errors of `huggingface_hub` in a block about a repository.

    Raises:
      HubError: The block raised an error: of the library, the connection, or the disk.
    """
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # the library also raises errors of the HTTP client that it uses
        got, expected, fix = _explanation(name, error)
        raise HubError(name, got=got, expected=expected, fix=fix) from error


def _explanation(name: HubName, error: Exception) -> tuple[str, str, str]:
    """Return what happened, what was expected, and how to fix it."""
    from huggingface_hub import HfApi, constants, errors, get_token

    page = f"{HfApi().endpoint}/{name.repo}"
    token = get_token()
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        got = f"a gated repository, and {'an account without access' if token else 'no token'}"
        fix = f"Ask for access on {page}, then: {LOGIN}."
        return got, "an account that may read it", fix
    if isinstance(error, errors.RepositoryNotFoundError):
        got = "no such local folder, and no such repository on the Hub"
        got += " that the token may read" if token else "; private ones need a token"
        return got, _FOUND, f"Check the name. For a private repository: {LOGIN}."
    if isinstance(error, errors.RevisionNotFoundError):
        fix = f"Choose one on {page}, and write {name.repo}@REVISION."
        return f"no revision {name.revision}", "a branch, a tag or a commit", fix
    if isinstance(error, errors.OfflineModeIsEnabled):
        got = f"HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} does not have it"
        return got, "a repository in the cache, or a connection", "Unset HF_HUB_OFFLINE."
    if status == 401:
        got = "a token that the Hub refuses" if token else "no token"
        return got, "a valid token", f"{LOGIN}."
    if status == 403:
        expected, fix = "a token with the permission", f"Create one that may write, then: {LOGIN}."
        return "a token without the permission", expected, fix
    return (
        f"{type(error).__name__}: {str(error)[:500]}",
        f"an answer from {HfApi().endpoint}, and room in {constants.HF_HUB_CACHE}",
        "Check the connection and the disk, then run the command again: files that are complete "
        "are kept. Set HF_ENDPOINT for another server, and HF_HOME for another folder.",
    )
