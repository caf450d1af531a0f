"""The embeddings of a folder's captions into one file, without latents: what `dit-fast encode --vae none` does."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dit_fast.data.captions import array_name
from dit_fast.data.encode import EncodeConfig
from dit_fast.data.listing import list_images, open_encoder
from dit_fast.errors import ConfigError
from dit_fast.files import check_output, write_atomically
from dit_fast.sampling.output import prepare_folder


def embed(config: EncodeConfig, world_size: int = 1) -> int:
    """Write an array (tokens, width) for each image, padding left out, to the .safetensors `config.out`; their number.

    The metadata name the encoder. All embeddings are in memory until they are written. Raises ConfigError, and what
    `dit_fast.data.encode.encode` raises of captions.
    """
    out = Path(config.out)
    if out.suffix != ".safetensors":
        raise ConfigError(
            f"--out {out}: --vae none writes embeddings of captions alone, to a file that ends in .safetensors"
        )
    if world_size > 1:
        raise ConfigError("--vae none runs in one process, not under torchrun")
    captions = open_encoder(config.text_encoder, config.caption_tokens, config.device)
    if captions is None:
        raise ConfigError("--vae none writes embeddings of captions alone: give --text-encoder")
    check_output(out)
    listing = list_images(Path(config.data), config.shard_size, captions)
    every: dict[str, Tensor] = {}
    with tqdm(total=len(listing.names), desc="encoding captions", disable=None) as bar:
        rows = range(len(listing.names))
        for batch in listing.embeddings(captions, rows, config.batch_size, config.dtype):
            for tokens in batch:
                used = (tokens != 0).any(dim=1).nonzero()
                length = int(used[-1]) + 1 if len(used) else 1
                every[array_name(listing.names[len(every)])] = tokens[:length].clone()
            bar.update(len(batch))
    prepare_folder(out.parent, sum(tokens.nbytes for tokens in every.values()))
    encoder = json.dumps(captions.identity())
    write_atomically(out, lambda temporary: save_file(every, temporary, metadata={"encoder": encoder}))
    return len(every)
