"""The prompts of `dit-fast sample`, as the captions that a model was trained on."""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from dit_fast.data.captions import EMBEDDINGS
from dit_fast.data.listing import open_encoder
from dit_fast.errors import ConfigError
from dit_fast.interop import ModelInfo
from dit_fast.models import DiT


def encode_prompts(
    args: argparse.Namespace, model: DiT, info: ModelInfo, device: torch.device
) -> Tensor | None:
    """Embeddings (P, S, E) of --prompt, by the text encoder that the model was trained with; None without captions.

    Raises ConfigError for prompts that a model of classes is given and for another encoder than the training's, and
    what the encoder raises.
    """
    if not model.caption_dim:
        if args.prompt or args.text_encoder:
            raise ConfigError(
                "--prompt and --text-encoder are of models trained on captions, this one is not"
            )
        return None
    if not args.prompt or args.classes:
        raise ConfigError('the model was trained on captions: give --prompt "..." and no --classes')
    trained = info.data.get("captions", {})
    name = args.text_encoder or trained.get("name")
    if name is None:
        raise ConfigError(f"{info.path} does not say what encoded its captions: give --text-encoder")
    encoder = open_encoder(name, trained.get("tokens"), str(device))
    assert encoder is not None
    from_file = Path(str(trained.get("name"))).suffix in EMBEDDINGS
    same = encoder.sha256 == trained.get("sha256", encoder.sha256) or from_file or not encoder.reads_texts
    if encoder.width != model.caption_dim or not same:
        raise ConfigError(
            f"--text-encoder {name} (width {encoder.width}, SHA-256 {encoder.sha256[:12]}) did not encode the captions "
            f"of {info.path} (width {model.caption_dim}, {trained.get('name')}, "
            f"SHA-256 {str(trained.get('sha256'))[:12]}): give that one"
        )
    return encoder(args.prompt, args.prompt)
