"""What a repository of heads holds beside their weights: what they remember of training, a card, code of one line."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

from dyvte.heads.card import model_card
from dyvte.heads.config import ExitHeadsConfig
from dyvte.heads.samples import FILE, Samples, write_samples
from dyvte.provenance import atomic_write

CODE = Path(__file__).parent / "files"
CODE_FILES = ("modeling_exit_heads.py", "custom_generate/generate.py")


def belongs(name: str) -> bool:
    """Whether something in a folder, by its name, is a part of the heads there."""
    known = ("config.json", "README.md", FILE, *(Path(file).parts[0] for file in CODE_FILES))
    return name in known or fnmatch(name, "model*.safetensors*")


def write_beside(folder: Path, config: ExitHeadsConfig, parameters: int, trained_on: Samples | None) -> None:
    """Writes all that :func:`belongs` to heads but their config and weights."""
    write_samples(folder, trained_on)
    atomic_write(folder / "README.md", model_card(config, parameters))
    for file in CODE_FILES:
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(CODE / file, folder / file)


def upload(
    folder: str,
    repo_id: str,
    commit_message: str | None,
    private: bool | None,
    token: bool | str | None,
    revision: str | None,
    create_pr: bool,
) -> str:
    """Puts a folder of heads on the hub; returns the address of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    return api.upload_folder(
        repo_id=api.create_repo(repo_id, private=private, exist_ok=True).repo_id,
        folder_path=folder,
        commit_message=commit_message or "Upload exit heads",
        revision=revision,
        create_pr=create_pr,
    )
