"""Find the folder of a model or an adapter: a local one, a cached one, or a download."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax_lora.errors import HubError, LoraError, ModelError
from jax_lora.hub.hub_library import hub_errors, hub_library, transfer_line
from jax_lora.hub.hub_name import HubName, find_hub_name
from jax_lora.hub.repository_files import (
    CONFIG,
    UNWANTED,
    WANTED,
    WEIGHTS,
    check_weights,
    has_weights,
    is_complete,
    wanted_files,
)
from jax_lora.storage.safe_paths import given_path

# Says what starts, and is the context of the transfer with its progress bars.
Reporting = Callable[[str], contextlib.AbstractContextManager[Any]]
# Snapshots that this process compared with the Hub, such as those of models without a tokenizer.
_COMPARED: set[Path] = set()


def local_folder(
    path: str | os.PathLike[str],
    reporting: Reporting = contextlib.nullcontext,
    *,
    weights: bool = True,
    error: type[LoraError] = ModelError,
) -> Path:
    """Return the folder that a path or a Hub name means.

    A local path of that name is preferred. A repository in the cache of `huggingface_hub` is used
    without a connection; any other one is downloaded, in the context `reporting(line)`, and without
    weights if they are not needed. `error` is the class for a path that cannot exist.

    Returns:
      The folder; it may not exist if `path` is not a Hub name.

    Raises:
      HubError: There is no such repository, it has no weights that can be read, or the download
        fails.
      LoraError: An `error`, if the file system refuses the path.
    """
    name = find_hub_name(path)
    return given_path(path, error) if name is None else snapshot(name, reporting, weights=weights)


def snapshot(
    name: HubName, reporting: Reporting = contextlib.nullcontext, *, weights: bool = True
) -> Path:
    """Return the cached folder of a repository's files, after a download if necessary.

    The arguments and errors are those of `local_folder`.
    """
    library = hub_library(name)
    cached = _cached(library, name)
    if cached is not None and (is_complete(cached) or cached in _COMPARED):
        return cached
    if cached is not None and not weights and (cached / CONFIG).is_file():
        return cached
    try:
        files = _list_files(library, name)
    except HubError:
        if cached is not None and has_weights(cached):
            return cached
        raise
    if not weights:
        files = {file: size for file, size in files.items() if not file.endswith(WEIGHTS)}
    line = transfer_line(name, "downloading", list(files.values()))
    with hub_errors(name), reporting(line):
        folder = Path(
            library.snapshot_download(
                name.repo, revision=name.revision, allow_patterns=sorted(files)
            )
        )
    if weights:
        _COMPARED.add(folder)
    return folder


def _cached(library: Any, name: HubName) -> Path | None:
    """Find a snapshot in the cache, which may lack files."""
    with hub_errors(name), contextlib.suppress(FileNotFoundError):
        return Path(
            library.snapshot_download(
                name.repo,
                revision=name.revision,
                local_files_only=True,
                allow_patterns=WANTED,
                ignore_patterns=UNWANTED,
            )
        )
    return None


def _list_files(library: Any, name: HubName) -> dict[str, int]:
    """List the files to download with their sizes."""
    with hub_errors(name):
        info = library.HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
    sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
    check_weights(name, sizes)
    return {file: sizes[file] for file in wanted_files(sizes)}
