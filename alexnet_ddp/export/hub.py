"""Uploads an exported folder to the Hugging Face Hub, with the optional library huggingface_hub."""

from importlib.util import find_spec
from pathlib import Path

from alexnet_ddp.config import ConfigError
from alexnet_ddp.runtime.errors import MachineError, RunError
from alexnet_ddp.runtime.redaction import HIDDEN

_REFUSED = (401, 403, 404)  # the Hub reports 404 for a repository that the token must not see
_MAX_REASON = 200  # characters of a server's message


def require_hub(repository: str) -> None:
    """Raise ConfigError unless huggingface_hub is installed, has a token and may use the network.

    repository: ORG/NAME, for the message.
    """
    if find_spec("huggingface_hub") is None:
        remedy = "pip install 'alexnet-ddp[hub]'"
        raise ConfigError(f"push={repository} needs huggingface_hub; {remedy}")
    from huggingface_hub import constants, get_token  # an extra

    if constants.HF_HUB_OFFLINE:
        rule = "needs the network, and HF_HUB_OFFLINE is set"
        raise ConfigError(f"push={repository} {rule}; unset it, or leave push out")
    if get_token() is None:
        rule = "needs a token of the Hugging Face Hub that may write"
        raise ConfigError(f"push={repository} {rule}; run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, repository: str, title: str) -> str:
    """Upload the files of `folder` as one commit, and return the address of the repository.

    A repository that does not exist is created, and is private. repository: ORG/NAME.
    title: of the commit. Raises ConfigError if the Hub refuses the token or the repository, and
    MachineError if the upload fails; the folder stays.
    """
    from huggingface_hub import HfApi, get_token  # an extra
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    logging.set_verbosity_error()
    api = HfApi()
    try:
        page = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=title)
    except MemoryError:
        raise
    except Exception as error:  # the library, httpx and hf_xet have no common class of errors
        raise _failure(error, folder, repository, get_token() or "") from None
    return str(page)


def _failure(error: Exception, folder: Path, repository: str, token: str) -> RunError:
    """The error to end with. Its message contains neither the token nor a signed address."""
    from huggingface_hub.errors import HfHubHTTPError

    kind: type[RunError] = MachineError
    reason, remedy = f"{type(error).__name__}: {error}", ""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        reason = f"HTTP {status} {error.server_message or error.response.reason_phrase}"
        if status in _REFUSED:
            kind, remedy = ConfigError, "use a token that may write there, then "
    reason = (reason.strip().splitlines() or [""])[0][:_MAX_REASON]
    if token:
        reason = reason.replace(token, HIDDEN)
    rule = f"push={repository} failed ({reason}), and the export is complete in {folder}"
    return kind(f"{rule}; {remedy}run: hf upload {repository} {folder}")
