"""Folders on the Hugging Face hub: private unless somebody says otherwise, and never with a path of this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

# Each buffer on disk has the first, each saved memory the others; answers to prompts have the prompts.
_SAMPLES = ("names.jsonl", "memory.json", "train.jsonl", "valid.jsonl", "predictions.jsonl")
_CHUNK = 1 << 22
_LONGEST = 4096  # bytes of a path


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool = True,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Uploads a folder to a model repository of the hub, which is made if it is not there.

    Every byte is searched before anything is sent: a file with a path of this machine (the home folder, the working
    folder, the folder itself) is refused, and so are checkpoints and memories, which hold training samples.

    Args:
        folder: as ``save_pretrained`` or an export writes it.
        repo_id: the repository, as ``owner/name``.
        private: make it private. A repository that is there and public is refused then.
        message: of the commit.
        token: of the hub; default: the one that ``hf auth login`` has stored.

    Returns:
        the repository's address.

    Raises:
        ValueError: for what is no repository's name; for a folder that is empty or has a file that is not to be
            handed on, naming it; for a public repository where a private one is asked for.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    if not isinstance(private, bool):
        raise ValueError(f"private={private!r}: expected True or False")
    check_folder(folder)
    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
    if private != bool(api.repo_info(repo_id, repo_type="model").private):
        raise ValueError(
            f"repo_id={repo_id!r}: the repository is there and public; give another name, or private=False to publish"
            if private
            else f"repo_id={repo_id!r}: the repository is there and private; make it public on the hub, or private=True"
        )
    api.upload_folder(
        repo_id=repo_id, folder_path=folder, repo_type="model", commit_message=message or "Upload with lightning_cl"
    )
    return str(url)


def check_repo_id(repo_id: str) -> None:
    """Checks the name of a repository.

    Raises:
        ValueError: saying what is wrong with it.
    """
    wanted = "expected 'owner/name', as the hub has it"
    if not isinstance(repo_id, str) or not repo_id.strip():
        raise ValueError(f"repo_id={repo_id!r}: it is empty or no text; {wanted}")
    if "://" in repo_id:
        raise ValueError(f"repo_id={repo_id!r}: is an address; {wanted}")
    if re.match(r"[/~.\\]|[A-Za-z]:", repo_id) or "\\" in repo_id or repo_id.count("/") > 1:
        raise ValueError(f"repo_id={repo_id!r}: is a path; {wanted}")
    if "/" not in repo_id:
        raise ValueError(f"repo_id={repo_id!r}: has no owner; {wanted}")
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"repo_id={repo_id!r}: {error}; {wanted}") from error


def check_folder(folder: str | Path) -> None:
    """Checks that a folder can be handed on.

    Compute: every byte is read once.

    Raises:
        ValueError: naming the file that has a path of this machine or training samples, or if there is no file.
    """
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    if not files:
        raise ValueError(f"folder={str(folder)!r}: has no files; expected a folder of an export or of save_pretrained")
    for path in files:
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".ckpt" or path.name in _SAMPLES:
            raise ValueError(
                f"{name}: is of a run's checkpoints or memory, which hold training samples; push an exported folder"
                " without them"
            )
    searched = _pattern(folder)
    for path in files:
        found = _search(path, searched)
        if found is not None:
            raise ValueError(
                f"{path.relative_to(folder).as_posix()}: has a path of this machine, {found!r}; take it out, or export"
                " again with the base's name on the hub as `model`"
            )


def _pattern(folder: Path) -> re.Pattern[bytes]:
    """The paths of this machine, as texts, JSON and addresses write them."""
    paths = {str(each) for each in (Path.home(), Path.cwd(), folder.absolute(), folder.resolve())}
    parts = set()
    for path in paths:
        if path == Path(path).anchor:
            continue  # it is in every file
        # A folder of one part, as /root, can be in a vocabulary; something in it is not.
        end = r"[\\/]+[\w.]" if len(Path(path).parts) == 2 else r"(?![\w-])"
        for written in {path, json.dumps(path)[1:-1], json.dumps(path, ensure_ascii=False)[1:-1], quote(path)}:
            parts.add(re.escape(written.encode()) + end.encode())
    return re.compile(b"|".join(sorted(parts)) or b"(?!)")


def _search(path: Path, pattern: re.Pattern[bytes]) -> str | None:
    """The first path in a file, or None."""
    for part in _parts(path):
        found = pattern.search(part)
        if found is not None:
            return found[0].decode(errors="replace")
    return None


def _parts(path: Path) -> Iterator[bytes]:
    """A file's content in pieces, each with the end of the one before."""
    before = b""
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            yield before + piece
            before = piece[-_LONGEST:]
