"""Uploading a finished folder."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import httpx

from .errors import ConversionError, first_line


T = TypeVar("T")

_ATTEMPTS = 5
# `upload_folder` makes one commit of everything, which the Hub may refuse to wait for when it is very large.
_LARGE = 30 * 2**30


def push(folder: Path, repository: str, private: bool = False, pause: float = 2.0) -> str:
    """Creates the repository if need be and uploads the folder in one commit; returns the repository's URL.

    Large files are sent first and the commit names them last, so a repository never shows half of a model; what a broken
    upload has sent is not sent again. Network errors and the server's own are tried again, each time after twice the
    pause, `pause` seconds at first.

    Raises:
        ConversionError: without a token, without permission, or if the server stays unreachable.
    """
    api = HfApi()
    url = _retry(lambda: api.create_repo(repository, private=private or None, exist_ok=True), repository, pause)
    size = sum(file.stat().st_size for file in folder.iterdir())
    if size > _LARGE:
        _retry(
            lambda: api.upload_large_folder(repo_id=repository, folder_path=folder, repo_type="model"),
            repository,
            pause,
        )
    else:
        message = f"Convert {folder.name} with internimage-hf"
        _retry(
            lambda: api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message),
            repository,
            pause,
        )
    return str(url)


def _retry(action: Callable[[], T], repository: str, pause: float) -> T:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return action()
        except LocalTokenNotFoundError as error:
            raise ConversionError("no token for the Hub: run `hf auth login` or set HF_TOKEN") from error
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            if status == 401:
                raise ConversionError(
                    "the Hub does not know this token: run `hf auth login` or set HF_TOKEN"
                ) from error
            if status == 403:
                raise ConversionError(f"this token may not write to {repository}") from error
            if status is not None and status < 500 and status not in (408, 409, 412, 429):
                raise ConversionError(f"the Hub refused {repository}: {first_line(error)}") from error
            problem = first_line(error)
        except (httpx.TransportError, ConnectionError, TimeoutError) as error:
            problem = first_line(error)
        except ValueError as error:  # a repository id that cannot be one
            raise ConversionError(f"cannot upload to {repository}: {first_line(error)}") from error
        if attempt < _ATTEMPTS:
            time.sleep(pause * 2 ** (attempt - 1))
    raise ConversionError(f"the Hub cannot be reached after {_ATTEMPTS} attempts: {problem}")
