"""Where checkpoints are: shipped with the package, in a folder, on the Hub.

Nothing here waits for torch.
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any

from genssm import disk

FILES = {"config.json", "model.safetensors", "tokenizer.model"}  # of a checkpoint


class CheckpointError(ValueError):
    """A checkpoint that cannot be found or read; the message says why and what to do."""


class UnknownModelError(CheckpointError):
    """A name that is neither a shipped model, nor a folder, nor a Hub id."""


def shipped_folders() -> dict[str, Path]:
    """The checkpoints that come with the package, by name."""
    package = Path(__file__).parent
    for root in (package / "checkpoints", package.parent / "checkpoints"):
        if root.is_dir():
            return {p.parent.name: p.parent for p in sorted(root.glob("*/config.json"))}
    return {}


def resolve(name: str | Path) -> Path:
    """The folder of a checkpoint: a shipped name, a folder, or a Hub id "owner/name".

    A ``Path`` is a folder, also where a shipped checkpoint has its name.
    """
    shipped = shipped_folders()
    folder = local_folder(name)
    if folder is not None:
        return folder
    if name and os.path.isfile(name):  # noqa: PTH113 - a name that no file can have is none
        raise UnknownModelError(f"{str(name)!r} is a file; give the checkpoint's folder")
    if isinstance(name, Path):
        raise UnknownModelError(f"there is no checkpoint folder {str(name)!r}")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _download(name)
    near = difflib.get_close_matches(name, shipped, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UnknownModelError(
        f"there is no model {name!r}; {hint}known: {', '.join(shipped) or 'none'}; "
        "or give a checkpoint folder or a Hugging Face id owner/name"
    )


def local_folder(name: str | Path) -> Path | None:
    """The shipped checkpoint or the folder of this name, None if there is none here."""
    if isinstance(name, str) and name in (shipped := shipped_folders()):
        return shipped[name]
    if not name:  # or Path would take it for the current folder
        return None
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder
        # A save that was killed between its two renames leaves this.
        previous = disk.previous(folder)
        return previous if previous.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # a name that no folder can have
        return None


def _download(repository: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=sorted(FILES)))
    except HFValidationError as error:
        raise CheckpointError(f"{repository!r} is not a Hugging Face id owner/name") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"could not fetch {repository!r} from the Hugging Face Hub, and no such folder is "
            "here; check the name and the network, or download the repository elsewhere and give "
            "its folder"
        ) from error


def record_metric(name: str | Path, metric: str, facts: dict[str, Any]) -> None:
    """Write a measurement into a checkpoint's config.json, replacing one of that name."""
    file = resolve(str(name)) / "config.json"
    config = json.loads(file.read_text())
    config["metrics"][metric] = facts
    disk.replace_file(file, lambda target: target.write_text(json.dumps(config, indent=1) + "\n"))


def check_replaceable(folder: Path) -> None:
    """Raise FileExistsError for what a checkpoint must not take the place of."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{str(folder)!r} is no folder; use another name")
    others = sorted({p.name for p in folder.iterdir()} - FILES) if folder.exists() else []
    if others:
        raise FileExistsError(
            f"{str(folder)!r} holds something else than a checkpoint, first {others[0]!r}, which "
            "would be lost; use another folder"
        )
