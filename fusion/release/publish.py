"""The released checkpoint, put on the Hugging Face hub."""

import re
from pathlib import Path
from typing import Any

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z", re.ASCII)
_TOKEN = "give a token that may write (HF_TOKEN, or `hf auth login`)"


def publish(folder: Path, repo: str, private: bool, token: str | None = None) -> str:
    """Make the hub repository where it is missing, and upload all of `folder` to it.

    Args:
        repo: `owner/name`.
        private: nobody else may see it; a public repository that is there already is refused.
        token: a hub token that may write; None takes the one that this machine is logged in with.

    Returns:
        The repository's address.

    Raises:
        ValueError: one line: a repo that is not owner/name, a folder that holds no model, no token, no
            connection, or the hub's refusal.
    """
    check_repo(repo, token)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: has no model (config.json and *.safetensors) to publish; release first")
    import huggingface_hub

    token = token or huggingface_hub.get_token()
    api = huggingface_hub.HfApi(token=token)
    try:
        url = str(api.create_repo(repo, private=private, exist_ok=True))
        exposed = private and not api.model_info(repo).private
        if not exposed:
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Fused model")
    except Exception as error:  # the client's own errors, and those of whichever HTTP library it stands on
        raise ValueError(f"release.hub: {repo} could not be published: {_why(error)}") from error
    if exposed:
        raise ValueError(f"release.hub: {repo} is public; set release.private to false, or name another")
    return url


def check_repo(repo: str, token: str | None = None) -> None:
    """What can be known before there is a model.

    Raises:
        ValueError: a repo that is not owner/name, or no token.
    """
    if not _REPO.match(repo):
        raise ValueError(f"release.hub: {repo!r} will not do; write owner/name, as in my-team/my-fusion")
    import huggingface_hub

    if not (token or huggingface_hub.get_token()):
        raise ValueError(f"release.hub: {repo} needs a token; {_TOKEN}, or leave release.hub out")


def _why(error: Any) -> str:
    """What stands in the way, and what would do, in one line without the token."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the hub does not authorise this ({status}); {_TOKEN} to that owner's models"
    if isinstance(error, OfflineModeIsEnabled):
        return "this machine is set offline; unset HF_HUB_OFFLINE"
    told = " ".join(str(error).split())[:160]
    if status is None:
        return f"the hub cannot be reached ({told}); try again with a connection, or leave release.hub out"
    return f"the hub answers {status} ({told})"
