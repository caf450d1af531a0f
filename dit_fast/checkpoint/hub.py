"""Models of the Hugging Face hub by id: `facebook/DiT-XL-2-256`, or `organization/name@revision`."""

import difflib
import os
import re
from pathlib import Path

from dit_fast.checkpoint.weight_file import DIFFUSERS_WEIGHTS
from dit_fast.errors import CheckpointError, MissingExtraError
from dit_fast.utils.terminal import one_line

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@((?!.*\.\.)[\w./-]+))?")
_FILE_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")

# The files that `load_model` and the decoder read; other files are not downloaded.
_CONFIGURATION = (
    "model_index.json",
    "config.json",
    "transformer/config.json",
    "vae/config.json",
    "scheduler/*.json",
)
_SUFFIXES = (".safetensors", ".safetensors.index.json", "-*-of-*.safetensors")
_SAFETENSORS = (
    "model.safetensors",
    *(f"{f}{DIFFUSERS_WEIGHTS}{s}" for f in ("", "transformer/", "vae/") for s in _SUFFIXES),
)

_PARTS = ("", "transformer/")

# Downloaded in this order, each where the ones before are missing: `.bin`, and variants.
_ELSE = tuple(
    tuple(f"{folder}{DIFFUSERS_WEIGHTS}{suffix}" for folder in folders for suffix in suffixes)
    for folders, suffixes in (
        (_PARTS, (".bin", ".bin.index.json", "-*-of-*.bin")),
        *(((*_PARTS, "vae/"), (f".{v}.*", f".{v}-*-of-*", f".*.index.{v}.json")) for v in ("fp16", "bf16")),
        ((*_PARTS, "vae/"), (".*",)),
    )
)


def is_hub_id(name: str | Path) -> bool:
    """Whether `name` has the form of a hub id, and neither it nor its first part names a file or folder.

    `runs/photo` beside a folder `runs` is a misspelled path, not a model of the organization `runs`.
    """
    text = str(name)
    written = _ID.fullmatch(text) is not None and not text.endswith(_FILE_SUFFIXES)
    return written and not Path(text).exists() and not Path(text).parent.is_dir()


def no_such_path(path: Path) -> str:
    """The message for a path that does not exist: it names the nearest one beside it."""
    beside = os.listdir(path.parent) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, 1)
    return f"{path}: no such file or folder" + (f"; did you mean {path.parent / near[0]}?" if near else "")


def fetch_hub_model(name: str) -> Path:
    """Download a model of the hub, or find it in the local cache.

    Args:
        name: Id, with "@" and a branch, tag or commit to pin a revision. Safetensors are preferred to `.bin`, and
            both to variants (fp16, bf16).

    Returns:
        The local folder.

    Raises:
        CheckpointError: The model is neither in the cache nor available from the network.
        MissingExtraError: huggingface_hub is not installed.
    """
    match = _ID.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{name}: not an id of a model on the Hugging Face hub (organization/name)")
    model, revision = match[1], match[2]
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError(
            f"{name}: no such file or folder; for models of the Hugging Face hub: huggingface_hub is not installed; "
            "pip install 'dit-fast[hub]'"
        ) from error

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))

    try:
        folder = fetch(*_CONFIGURATION, *_SAFETENSORS)
        for patterns in _ELSE:
            if any(
                path.suffix in (".safetensors", ".bin") for part in _PARTS for path in folder.glob(f"{part}*")
            ):
                break
            folder = fetch(*_CONFIGURATION, *patterns)
    except Exception as error:  # the errors of its HTTP client differ between versions
        pinned = f" --revision {revision}" if revision else ""
        raise CheckpointError(
            f"{name}: no such file or folder, and no such model in the Hugging Face cache or from the network "
            f"({one_line(error)}); run `hf download {model}{pinned}` on a machine with a network, and give the "
            "folder that it prints"
        ) from error
    return folder
