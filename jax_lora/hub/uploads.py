"""Upload the files of an adapter or a model to a repository on the Hub."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_lora.errors import HubError
from jax_lora.hub.hub_library import hub_errors, hub_library, transfer_line
from jax_lora.hub.hub_name import HubName
from jax_lora.hub.snapshots import Reporting


def upload(
    folder: Path,
    files: Sequence[str],
    name: HubName,  # its revision is a branch, created if necessary
    *,
    private: bool = False,  # create a private repository, and refuse a public one
    reporting: Reporting = contextlib.nullcontext,  # as in `local_folder`
) -> str:
    """Upload files of a folder as one commit; the repository is created if necessary.

    Returns:
      The address of the repository, or of the branch.

    Raises:
      HubError: There is no token for it, the repository is public despite `private`, or the upload
        fails.
    """
    library = hub_library(name)
    sizes = [(folder / file).stat().st_size for file in files]
    api = library.HfApi()
    with hub_errors(name):
        address = str(api.create_repo(name.repo, private=private or None, exist_ok=True))
        if private:
            _refuse_public(api, name)
        if name.revision is not None:
            api.create_branch(name.repo, branch=name.revision, exist_ok=True)
        with reporting(transfer_line(name, "uploading", sizes)):
            api.upload_folder(
                repo_id=name.repo,
                folder_path=folder,
                allow_patterns=list(files),
                revision=name.revision,
                commit_message="Upload with jax-lora",
            )
    return address if name.revision is None else f"{address}/tree/{name.revision}"


def _refuse_public(api: Any, name: HubName) -> None:
    if not api.model_info(name.repo).private:
        got = "a public repository of this name; nothing is uploaded"
        fix = "Choose another name, or make the repository private in its settings."
        expected = "a new name, or a private repository"
        raise HubError(f"private=True for {name}", got=got, expected=expected, fix=fix)
