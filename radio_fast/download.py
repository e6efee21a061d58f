"""Fetch checkpoints and repositories: resumed where they broke off, hash-checked, complete or not there."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from pathlib import Path

from radio_fast.errors import DownloadError
from radio_fast.models.registry import Version
from radio_fast.paths import default_cache_dir

logger = logging.getLogger(__name__)


def fetch_version(
    version: Version,
    *,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
    sha256: str | None = None,
    timeout: float = 10.0,
) -> Path:
    """The version's checkpoint file, downloaded unless the cache has it.

    Raises:
        DownloadError: it is not in the cache and the server can't be reached, or what came has another hash.
    """
    from huggingface_hub import hf_hub_url

    folder = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    url = hf_hub_url(f"nvidia/{version.repo}", version.file)
    return fetch(url, folder / version.file, progress=progress, sha256=sha256, timeout=timeout)


def fetch(url: str, path: Path, *, progress: bool = True, sha256: str | None = None, timeout: float = 10.0) -> Path:
    """Download `url` to `path`, unless it is there already.

    The bytes go to `path.<etag>.part`; a later call goes on where this one broke off. Complete, they are hashed,
    checked against `sha256` (else against the server's own hash, where it tells one), noted in `path.json` and only
    then moved to `path`. A file with a wrong hash is kept aside as `path.bad-<hash>`.

    Raises:
        DownloadError: the server can't be reached or breaks off, the disk is full, or the hash is wrong.
    """
    check_sha256(sha256)
    path = Path(path)
    if path.is_file():
        verify(path, sha256)
        return path

    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():  # another process may have brought it while this one waited
            _download(url, path, progress, sha256, timeout)
    return path


def _download(url: str, path: Path, progress: bool, sha256: str | None, timeout: float) -> None:
    from urllib.parse import urlparse

    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    instead = "give checkpoint=PATH if you have the file, or random_init=True for random weights"
    try:
        meta = get_hf_file_metadata(url, timeout=timeout)
    except Exception as error:  # network, proxy, TLS, HTTP status and offline mode have no common class
        raise DownloadError(f"{url} can't be reached ({_first_line(error)}); {instead}") from error

    etag = re.sub(r"[^0-9A-Za-z]", "", meta.etag or "")[:64]
    part = path.with_name(f"{path.name}.{etag[:16] or 'unknown'}.part")
    done = part.stat().st_size if part.exists() else 0
    if done and (not etag or (meta.size is not None and done > meta.size)):
        part.unlink()  # without an ETag nothing says that these are bytes of the same file
        done = 0
    # A token for the hub must not travel on to the storage host it redirects to.
    same_host = urlparse(url).netloc == urlparse(meta.location).netloc
    try:
        with part.open("ab") as file:
            http_get(
                meta.location,
                file,
                resume_size=done,
                headers=build_hf_headers() if same_host else {},
                expected_size=meta.size,
                displayed_filename=path.name,
                tqdm_class=None if progress else _silent_bar(),
            )
    except Exception as error:
        kept = part.stat().st_size if part.exists() else 0
        raise DownloadError(
            f"the download of {url} broke off after {kept} of {meta.size} bytes ({_first_line(error)}); they are kept, "
            f"call again to go on; or {instead}"
        ) from error

    with part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    expected = sha256.lower() if sha256 else (etag.lower() if re.fullmatch(r"[0-9a-fA-F]{64}", etag) else None)
    if expected is not None and digest != expected:
        aside = path.with_name(f"{path.name}.bad-{digest[:8]}")
        os.replace(part, aside)
        raise DownloadError(
            f"{url} has sha256 {digest}, expected {expected}: refused and kept aside as {aside} for inspection"
        )
    record = {"url": url, "size": part.stat().st_size, "sha256": digest, "verified": expected is not None}
    sidecar = Path(f"{path}.json")
    sidecar.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
    logger.info("downloaded %s to %s, sha256 %s", url, path, digest)


# -- Hugging Face repositories --------------------------------------------------------------------------------


def is_repo_id(name: object) -> bool:
    """Whether a name has the form ORGANISATION/NAME of a Hugging Face repository, as huggingface_hub checks it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return isinstance(name, str) and name.count("/") == 1


def fetch_repo(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
    timeout: float = 10.0,
    local_files_only: bool = False,
) -> Path:
    """The folder of a repository's config and weights in huggingface_hub's cache, downloaded unless they are there.

    Nothing else is downloaded: no code, and no `pytorch_model*.bin` where there are safetensors. huggingface_hub sees
    to `HF_HUB_OFFLINE`, `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT` and `HF_TOKEN`, takes up broken connections within a
    call and keeps whole files; those that are new here are held against the hash that the server names them by.

    Args:
        repo_id: ORGANISATION/NAME.
        revision: a branch, a tag or a commit; "main" if None.
        token: of the hub's account; True for the one logged in with, False for none, None for that if there is one.
        cache_dir: in place of huggingface_hub's own cache.
        timeout: seconds to wait for the server to say what a file is.
        local_files_only: take what is in the cache, and ask no server.

    Raises:
        ValueError: a revision or token that is none.
        DownloadError: there is no such repository or revision, it may not be read, or it is neither in the cache nor to
            be had; the message says what to do.
    """
    from huggingface_hub import constants, snapshot_download

    if revision is not None and not (isinstance(revision, str) and revision):
        raise ValueError(f"revision must be the name of a branch, a tag or a commit, got {revision!r}")
    if token is not None and not isinstance(token, (str, bool)):
        raise ValueError(f"token must be a string, True, False or None, got {type(token).__name__}")
    cache = Path(cache_dir if cache_dir is not None else constants.HF_HUB_CACHE).expanduser()
    blobs = cache / f"models--{repo_id.replace('/', '--')}" / "blobs"
    before = {path.name for path in blobs.glob("*")}

    def bring(file: str, shards: str) -> Path:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                cache_dir=cache,
                allow_patterns=["config.json", f"{file}.index.json", shards],
                ignore_patterns=["*/*"],  # subfolders hold other formats of the same weights
                etag_timeout=timeout,
                tqdm_class=None if progress else _silent_bar(),
                local_files_only=local_files_only,
            )
        )

    try:
        file = "model.safetensors"
        folder = bring(file, "*.safetensors")
        if not (folder / file).is_file() and not (folder / f"{file}.index.json").is_file():
            folder = bring("pytorch_model.bin", "pytorch_model*.bin")
    except Exception as error:  # network, proxy, TLS, HTTP status and a full disk have no common class
        raise DownloadError(_why_no_repo(error, repo_id, revision, cache)) from error
    for path in blobs.glob("*"):  # those of large files have their sha256 as name
        if path.name not in before and re.fullmatch(r"[0-9a-f]{64}", path.name):
            with path.open("rb") as blob:
                digest = hashlib.file_digest(blob, "sha256").hexdigest()
            if digest != path.name:
                path.unlink()
                raise DownloadError(
                    f"a file of {repo_id} has sha256 {digest}, expected {path.name}: deleted; call again to download it"
                )
    return folder


def _why_no_repo(error: Exception, repo_id: str, revision: str | None, cache: Path) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    server = constants.ENDPOINT
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: accept its terms at {server}/{repo_id}, then `hf auth login` or give token="
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{server} has no repository {repo_id} that you may see: check the name; for a private one `hf auth login` "
            f"or give token=; a folder is given by its path, and there is none at {repo_id}"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}: give a branch, a tag or a commit listed at {server}/{repo_id}"
    instead = "give the path of a folder that has the files"
    at = f"{repo_id}{f' at {revision}' if revision else ''}"
    if isinstance(error, LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set: unset it"
        elif error.__cause__ is None:
            why = "local_files_only is set: leave it out"
        else:
            why = f"{server} can't be reached ({_first_line(error.__cause__)}): call again when it can be"
        return f"{at} is not, or not wholly, in the cache {cache}, and {why}; or {instead}"
    return (
        f"the download of {at} from {server} failed ({_first_line(error)}); whole files are kept, call again to go "
        f"on; or {instead}"
    )


# -- hashes ---------------------------------------------------------------------------------------------------


def check_sha256(sha256: str | None) -> None:
    """64 hexadecimal digits, or None.

    Raises:
        ValueError: anything else.
    """
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch(r"[0-9a-fA-F]{64}", sha256)):
        raise ValueError(f"sha256 must be 64 hexadecimal digits, got {sha256!r}")


def verify(path: Path, sha256: str | None) -> None:
    """Hold a file that is there against the hash asked for, if one was.

    Raises:
        DownloadError: it has another.
    """
    if sha256 is None:
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256.lower():
        raise DownloadError(f"{path} has sha256 {digest}, expected {sha256.lower()}: remove it to download it again")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _silent_bar() -> type:
    from tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent
