"""Files of the Hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled


SECONDS = 10.0  # within which the Hub must answer at all
_ASKS_ONCE = int(huggingface_hub.__version__.partition(".")[0]) >= 1  # before, every question was repeated, aloud


class NoAnswerError(OSError):
    """The Hub does not answer, and what is asked for has not been downloaded before."""


def fetch(repo: str, name: str, revision: str | None = None) -> Path:
    """Bring a file of a repository into the Hub's cache.

    Args:
        repo: Hub id.
        name: Of the file.
        revision: Branch, tag or commit; by default main.

    Raises:
        NoAnswerError: The Hub cannot be reached.
        HfHubHTTPError: There is no such file, or one of the other errors of hf_hub_download.
    """
    if _ASKS_ONCE and try_to_load_from_cache(repo, name, revision=revision) is None:
        # hf_hub_download would try for half a minute, and print every attempt.
        try:
            get_hf_file_metadata(hf_hub_url(repo, name, revision=revision), timeout=SECONDS)
        except (HfHubHTTPError, OfflineModeIsEnabled):
            pass  # of which hf_hub_download says more, or which it tries again
        except Exception as error:  # of requests before huggingface_hub 1, of httpx since
            raise NoAnswerError(f"the Hub does not answer: {error}") from error
    return Path(hf_hub_download(repo, name, revision=revision))
