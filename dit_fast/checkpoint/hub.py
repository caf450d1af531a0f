"""Models of the Hugging Face hub by their ids: `facebook/DiT-XL-2-256`, or `organisation/name@revision`."""

import re
from pathlib import Path

from dit_fast.checkpoint.weight_file import first_line
from dit_fast.errors import CheckpointError, MissingExtraError

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@((?!.*\.\.)[\w./-]+))?")
_FILE_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")

# What `load_model` and the decoder read; other files of a repository stay there.
_CONFIGURATION = (
    "model_index.json",
    "config.json",
    "transformer/config.json",
    "vae/config.json",
    "scheduler/*.json",
)
_NAME = "diffusion_pytorch_model"
_SUFFIXES = (".safetensors", ".safetensors.index.json", "-*-of-*.safetensors")
_SAFETENSORS = (
    "model.safetensors",
    *(f"{f}{_NAME}{s}" for f in ("", "transformer/", "vae/") for s in _SUFFIXES),
)
# Asked for only where there are no weights in safetensors.
_OLDER = (f"{_NAME}.bin", f"transformer/{_NAME}.bin")


def is_hub_id(name: str | Path) -> bool:
    """Whether `name` is written as an id of the hub, and nothing on disk has that name."""
    text = str(name)
    written = _ID.fullmatch(text) is not None and not text.endswith(_FILE_SUFFIXES)
    return written and not Path(text).exists()


def fetch_hub_model(name: str) -> Path:
    """The local folder of a model of the hub: from its cache, what is missing there from the network.

    `name`: id, with "@" and a branch, tag or commit to pin it. Weights in safetensors are preferred to `.bin`, which is
    fetched where there are no others. Raises CheckpointError, in one line, for a model that neither the cache nor the
    network gives, and MissingExtraError without huggingface_hub.
    """
    match = _ID.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{name}: no id of a model on the Hugging Face hub (organisation/name)")
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
        if not any([*folder.glob("*.safetensors"), *folder.glob("transformer/*.safetensors")]):
            folder = fetch(*_CONFIGURATION, *_OLDER)
    except Exception as error:  # what its HTTP client raises changes from version to version
        pinned = f" --revision {revision}" if revision else ""
        raise CheckpointError(
            f"{name}: no such file or folder, and no such model in the Hugging Face cache or from the network "
            f"({first_line(error)[:200]}); run `hf download {model}{pinned}` where there is a network, and give the "
            "folder that it prints"
        ) from error
    return folder
