"""Upload and download decompositions on the Hugging Face hub, or on a server with its protocol (HF_ENDPOINT).

Every failure becomes a ValueError of one line: no network, no permission, no such repository, a truncated file.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

from l3d.data.extras import import_extra
from l3d.decomposition.subnetworks import Subnetworks
from l3d.storage.store import save

SCHEME = "hf://"
FILES = ("decomposition.json", "decomposition.safetensors", "manifest.json", "README.md")
_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def push(
    decomposition: Subnetworks,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a decomposition with its model card, as one commit; create the repository if it is missing.

    Args:
        decomposition: to upload.
        repo_id: "USER/NAME", or "hf://USER/NAME".
        private: whether a new repository is private; None is the hub's default.
        revision: the branch; None is main.
        message: the commit's message.
        token: access token; None takes the one of `hf auth login` or HF_TOKEN.

    Returns the commit's address. Raises ValueError in one line if the hub cannot be reached or refuses.
    """
    repo, branch = parse(repo_id)
    message = message or f"Upload {decomposition.n_subnetworks} subnetworks"
    api = _client(repo).HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(decomposition, folder)
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo, folder_path=folder, revision=revision or branch, commit_message=message
            )
        except Exception as error:  # the client's error classes differ by version and HTTP library
            raise ValueError(f"{SCHEME}{repo}: cannot be uploaded: {_reason(error)}") from error
    return str(commit.commit_url)


def pull(address: str) -> Path:
    """Download a decomposition from "hf://USER/NAME" or "hf://USER/NAME@REVISION" and return its folder.

    Raises ValueError in one line if the hub cannot be reached or refuses, or the repository holds no decomposition.
    """
    repo, revision = parse(address)
    hub = _client(repo)
    try:
        folder = hub.snapshot_download(repo, revision=revision, allow_patterns=list(FILES))
    except Exception as error:  # the client's error classes differ by version and HTTP library
        raise ValueError(f"{SCHEME}{repo}: cannot be downloaded: {_reason(error)}") from error
    if not (Path(folder) / FILES[0]).is_file():
        raise ValueError(f"{SCHEME}{repo}: holds no {FILES[0]}: not a decomposition of l3d")
    return Path(folder)


def parse(address: str) -> tuple[str, str | None]:
    """Split "hf://USER/NAME@REVISION" into the repository and the revision; the revision may be missing, then None.

    >>> parse("hf://user/name@main")
    ('user/name', 'main')
    """
    match = _ID.fullmatch(address.removeprefix(SCHEME))
    if match is None:
        raise ValueError(f"repo_id: expected USER/NAME or {SCHEME}USER/NAME@REVISION, got {address!r}")
    return match[1], match[2]


def _client(repo: str) -> Any:
    return import_extra("huggingface_hub", "hf", f"{SCHEME}{repo}: huggingface_hub is not installed")


def _reason(error: Exception) -> str:
    """Return the first 200 characters of an error in one line; the hub's client adds many lines of advice."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} ..."
