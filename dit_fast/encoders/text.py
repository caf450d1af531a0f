"""Embeddings of captions, with a CLIP or T5 text encoder of transformers."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_fast.encoders.autoencoder import weights_digest
from dit_fast.errors import CheckpointError, ConfigError, MissingExtraError
from dit_fast.utils.files import check_file, read_json
from dit_fast.utils.terminal import listed, one_line

MOST_TOKENS = 120
"""Tokens of a caption, unless the tokenizer has a lower limit; the number of PixArt-alpha for T5."""


_MOST_LAYERS = 1 << 10
# Tensors of a complete CLIP or T5, or of older versions of transformers, that do not belong to the text encoder.
_OTHER_HALVES = re.compile(
    r"vision_model\.|visual_projection\.|text_projection\.|logit_scale$|(.*\.)?position_ids$|decoder\.|lm_head\."
)


class TextEncoder:
    """Last hidden states of a CLIP text model or a T5 encoder, (B, S, E), with zeros after the end of a caption.

    `sha256` is the digest of all weights and of the tokenizer's output. Weights are read from safetensors only.

    Args:
        name: Id on the Hugging Face hub (openai/clip-vit-large-patch14, google/t5-v1_1-xxl), or a folder of
            transformers with the tokenizer.
        tokens: Number of tokens S; longer captions are truncated. None: the limit of the tokenizer, at most
            `MOST_TOKENS`.
        device: Device of the model.

    Raises:
        MissingExtraError: transformers is not installed.
        CheckpointError: The model cannot be loaded.
        ConfigError: The model is neither CLIP nor T5, or does not support as many tokens.
    """

    reads_texts = True

    def __init__(self, name: str, tokens: int | None = None, device: torch.device | str = "cpu") -> None:
        try:
            from transformers import AutoConfig, AutoTokenizer, CLIPTextModel, T5EncoderModel
        except ImportError as error:
            raise MissingExtraError(
                "transformers, which encodes captions, is not installed; pip install 'dit-fast[text]'"
            ) from error
        kinds: dict[str, Any] = {
            "clip": CLIPTextModel,
            "clip_text_model": CLIPTextModel,
            "t5": T5EncoderModel,
        }
        try:
            if Path(name).is_dir():
                _check_folder(Path(name))
            config = AutoConfig.from_pretrained(name)
            kind = config.model_type
            if kind not in kinds:
                raise ConfigError(f"--text-encoder {name} is a {kind}: give a CLIP or a T5")
            if Path(name).is_dir():
                _check_size(kinds[kind], getattr(config, "text_config", config), Path(name))
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            # Mismatches are not raised here: `_require_whole` lists all of them at once.
            model, found = kinds[kind].from_pretrained(
                name, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
            _require_whole(model, found)
        except ConfigError:
            raise
        except Exception as error:  # transformers may raise anything for an invalid configuration
            where = name if Path(name).is_dir() else f"{name} (offline? give --text-encoder a local folder)"
            raise CheckpointError(f"cannot load the text encoder {where}: {one_line(error)}") from error
        model = model.float()
        most = self.tokenizer.model_max_length
        self.name, self.tokens = name, tokens or min(most, MOST_TOKENS)
        if kind != "t5" and self.tokens > most:
            raise ConfigError(f"--caption-tokens {tokens}: {name} takes up to {most}")
        self.width = int(model.config.d_model if kind == "t5" else model.config.hidden_size)
        weights = weights_digest(model.state_dict())
        # The output for one caption identifies vocabulary and settings of the tokenizer, whose files differ in layout.
        sample = self.tokenizer("A photo, 1 of 2.", truncation=True).input_ids
        self.sha256 = hashlib.sha256(f"{weights} {len(self.tokenizer)} {sample}".encode()).hexdigest()
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()

    @torch.no_grad()
    def __call__(self, names: Sequence[str], texts: Sequence[str]) -> Tensor:
        """Embeddings float32 (B, S, E) on the CPU of the captions `texts`; `names` are not used."""
        encoded = self.tokenizer(
            list(texts), max_length=self.tokens, padding="max_length", truncation=True, return_tensors="pt"
        ).to(self.device)
        hidden = self.model(
            input_ids=encoded.input_ids, attention_mask=encoded.attention_mask
        ).last_hidden_state
        return torch.where(encoded.attention_mask[..., None] > 0, hidden.float(), 0).cpu()

    def identity(self) -> dict[str, Any]:
        """JSON-serializable identity; encoders with equal values, except for `name`, compute the same embeddings."""
        name = os.path.abspath(self.name) if Path(self.name).is_dir() else self.name
        return {"name": name, "sha256": self.sha256, "tokens": self.tokens, "width": self.width}


def _check_folder(folder: Path) -> None:
    """Raise CheckpointError for the folder of a pipeline, and for pipes and devices, which transformers would open."""
    if (folder / "model_index.json").exists():
        raise CheckpointError(
            f"this is the folder of a pipeline; give {folder / 'text_encoder'}, with its tokenizer"
        )
    for path in folder.iterdir():
        if path.suffix == ".json":
            read_json(path, CheckpointError)
        elif path.suffix in (".safetensors", ".txt", ".model"):
            check_file(path, CheckpointError)


def _check_size(kind: Any, config: Any, folder: Path) -> None:
    """Raise CheckpointError for a configuration with more weights than the files contain, before allocation."""
    layers = config.num_hidden_layers
    if type(layers) is not int or not 0 < layers <= _MOST_LAYERS:
        raise CheckpointError(f"config.json has {layers!r} layers")
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in kind(config).parameters())
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if wanted > held:  # no weight takes less than a byte
        raise CheckpointError(f"config.json describes {wanted} weights, the files have {held} bytes")


def _require_whole(model: Any, found: Mapping[str, Any]) -> None:
    """Raise CheckpointError for tensors that are missing, misshaped, unexpected or not finite."""
    others = sorted(key for key in found["unexpected_keys"] if not _OTHER_HALVES.match(key))
    problems = [f"missing {key}" for key in sorted(found["missing_keys"])]
    problems += [f"misshaped {key[0]}" for key in sorted(found["mismatched_keys"])]
    problems += [f"unexpected {key}" for key in others]
    problems += [
        f"{key} contains NaN or infinity"
        for key, value in model.state_dict().items()
        if not value.isfinite().all()
    ]
    if problems:
        raise CheckpointError(f"the weights do not fit its configuration: {listed(problems)}")
