"""Uploads a saved student to the hub."""

from __future__ import annotations

import re
from glob import escape
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from opd.errors import RecipeError
from opd.files.ours import LIST, foreign, listed, named
from opd.files.whole import told


def check_push(repository: str) -> None:
    """Raise `RecipeError` where an upload could not work; nothing is asked over the network."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise RecipeError(f"{repository!r} is no repository of the hub; give ORG/NAME")
    if constants.HF_HUB_OFFLINE:
        raise RecipeError(f"push_to is {repository!r} and HF_HUB_OFFLINE is set: unset one of them")
    if huggingface_hub.get_token() is None:
        raise RecipeError(f"push_to is {repository!r} and there is no token: set HF_TOKEN, or run hf auth login")


def push(folder: Path, repository: str) -> str | None:
    """Upload what `opd` wrote into a folder to a repository, which is made, private, where there is none; what somebody
    else put there stays. None, or in a sentence why it could not be done and how to do it by hand."""
    ours, besides = listed(folder), foreign(folder)
    more = f" (which takes {named(besides)} too)" if besides else ""
    by_hand = f"by hand: hf upload {repository} {folder}{more}"
    if not ours:
        return f"the student was not uploaded to {repository} ({folder / LIST} does not list its files); {by_hand}"
    try:
        huggingface_hub.create_repo(repository, private=True, exist_ok=True)
        huggingface_hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Student trained with opd",
            allow_patterns=sorted(escape(name) for name in ours),
        )
        return None
    except Exception as error:
        reason, token = told(error), huggingface_hub.get_token()
        reason = reason.replace(token, "(token)") if token else reason
        return f"the student was not uploaded to {repository} ({reason}); {by_hand}"
