"""In: a finished folder. Out: a repository on the Hub."""

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import httpx, validate_repo_id

from .errors import ConversionError, describe, first_line, listed


T = TypeVar("T")

_ATTEMPTS = 5
# The files that transformers reads weights from.
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
_LOGIN = "run `hf auth login` or set HF_TOKEN"
_AGAIN = "run the same command again: what was sent is not sent twice"


def check_repository(repository: str) -> None:
    """Raises ConversionError for an invalid repository id."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConversionError(f"cannot upload to {repository!r}: {first_line(error)}") from error


def push(folder: Path, repository: str, private: bool = False, pause: float = 2.0) -> str:
    """Creates a missing repository and uploads the folder in one commit; returns the repository's URL.

    Large files are sent first and named by the commit at the end: a repository never shows an incomplete model. An upload
    after an interruption does not send the same files again. The commit removes the repository's weight files that the folder
    lacks: transformers might load those instead. Hidden files are not uploaded. Network and server errors are retried after
    `pause` seconds, then twice as long each time.

    Raises:
        ConversionError: without a token, without permission, if a file cannot be read or is refused, if the repository is
            public although `private`, or if the server stays unreachable.
    """
    check_repository(repository)
    api = HfApi()

    def create() -> tuple[str, str]:
        existed = private and "/" in repository and api.repo_exists(repository)
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        if existed and api.repo_info(url.repo_id).private is False:
            raise ConversionError(
                f"{repository} exists and is public, --private does not change that: nothing was sent"
            )
        return str(url), url.repo_id

    def upload() -> None:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        names = {file: file.relative_to(folder).as_posix() for file in files}
        sent = [file for file in files if not any(part.startswith(".") for part in Path(names[file]).parts)]
        if len(sent) < len(files):
            hidden = listed(names[file] for file in files if file not in sent)
            print(f"not uploaded: {len(files) - len(sent)} hidden files: {hidden}")
        operations = [CommitOperationAdd(names[file], file) for file in sent]
        there = {sibling.rfilename for sibling in api.repo_info(identifier).siblings or ()}
        if stale := sorted(name for name in there - set(names.values()) if _WEIGHTS.fullmatch(name)):
            print(f"removed from {identifier}: {len(stale)} weight files of another upload: {listed(stale)}")
            operations += [CommitOperationDelete(name) for name in stale]
        api.create_commit(identifier, operations, commit_message=f"Convert {folder.name} with internimage-hf")

    url, identifier = _retry(create, repository, pause)
    _retry(upload, repository, pause)
    return url


def _retry(action: Callable[[], T], repository: str, pause: float) -> T:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return action()
        except ConversionError:
            raise
        except Exception as error:  # huggingface_hub wraps errors of large files in a RuntimeError
            problem = _problem(error, repository)
            if attempt < _ATTEMPTS:
                wait = pause * 2 ** (attempt - 1)
                print(f"upload to {repository}: {problem}; again in {wait:g} s", file=sys.stderr, flush=True)
                time.sleep(wait)
    raise ConversionError(f"cannot upload to {repository} after {_ATTEMPTS} attempts: {problem}; {_AGAIN}")


def _problem(error: Exception, repository: str) -> str:
    """Describes the error if another attempt may help.

    Raises:
        ConversionError: if another attempt cannot help.
    """
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    # "Error while uploading 'model.safetensors' to the Hub.", and its cause
    what = f"{first_line(error).rstrip('.')}: " if isinstance(error, RuntimeError) and len(causes) > 1 else ""

    def final(reason: str, advice: str) -> ConversionError:
        return ConversionError(f"cannot upload to {repository}: {what}{reason}; {advice}")

    for cause in causes:
        if isinstance(cause, LocalTokenNotFoundError):
            raise final("there is no token for the Hub", _LOGIN) from error
        if isinstance(cause, OfflineModeIsEnabled):
            raise final("the Hub is switched off", "unset HF_HUB_OFFLINE") from error
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            status = cause.response.status_code
            reason = f"the Hub answered {status} ({first_line(cause)})"
            if what:  # links to a large file's storage expire: the next attempt gets a new one
                reason = f"the storage answered {status} ({first_line(cause)})"
                if status == 413:
                    raise final(reason, "convert again with a smaller --max-shard-size") from error
                if status in (401, 403):
                    return what + reason
            elif status == 401:
                raise final("the Hub does not know this token", _LOGIN) from error
            elif status == 403:
                raise final("this token may not write to it", f"{_LOGIN} with a token of the role `write`") from error
            elif status == 413:
                raise final(reason, "convert again with a smaller --max-shard-size") from error
            if status >= 500 or status in (408, 409, 412, 425, 429):
                return what + reason
            raise final(reason, "check the repository's id and its settings on the Hub") from error
        if isinstance(cause, (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.InvalidURL)):
            raise final(first_line(cause), "check HF_ENDPOINT, HF_TOKEN and the proxy's settings") from error
        if isinstance(cause, httpx.TransportError):
            if "CERTIFICATE_VERIFY_FAILED" in str(cause):
                raise final(first_line(cause), "check the clock, the proxy, and SSL_CERT_FILE") from error
            return f"{what}{type(cause).__name__}: {first_line(cause)}"
        if isinstance(cause, (ConnectionError, TimeoutError)):
            return f"{what}{type(cause).__name__}: {first_line(cause)}"
    root = causes[-1]
    if isinstance(root, PermissionError) and root.errno is None:  # errors of hf_xet's storage
        raise final(first_line(root), f"{_LOGIN} with a token of the role `write`") from error
    if isinstance(root, OSError):
        raise final(describe(root), _AGAIN) from error
    if isinstance(error, RuntimeError):  # hf_xet has no classes for network errors
        return what + first_line(root)
    raise final(f"{type(root).__name__}: {first_line(root)}", "nothing was committed") from error
