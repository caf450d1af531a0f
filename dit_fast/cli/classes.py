"""The class or caption of each sample of a request, computed where it is read: a request may be of any number."""

import argparse
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dit_fast.cli.sample_options import PER_CLASS
from dit_fast.data import captions_of, relocate
from dit_fast.data.captions import EMBEDDINGS, open_encoder
from dit_fast.errors import ConfigError
from dit_fast.interop import ModelInfo
from dit_fast.model.dit import DiT
from dit_fast.utils import keyed


@dataclass(frozen=True)
class Labels:
    """Labels of `num` samples.

    Args:
        num: number of samples.
        rule: what the labels are, in words that are equal for equal labels.
        of: labels int64 (n,) of the samples with the numbers int64 (n,).
    """

    num: int
    rule: str
    of: Callable[[Tensor], Tensor]

    @classmethod
    def in_turn(cls, num: int, labels: list[int]) -> "Labels":
        """Each of `labels` in turn."""
        values = torch.tensor(labels)
        return cls(num, f"{labels} in turn", lambda numbers: values[numbers % len(values)])

    @classmethod
    def random(cls, num: int, seed: int, high: int) -> "Labels":
        """Random labels below `high`, a function of the seed and a sample's number."""
        key = keyed.key(seed, "sampling labels")
        return cls(num, f"random below {high}", lambda numbers: keyed.integers(key, numbers, high))

    def __len__(self) -> int:
        return self.num

    def first(self, most: int) -> Tensor:
        """Labels of the first `most` samples, or of all if there are fewer, int64 (n,)."""
        return self.of(torch.arange(min(most, self.num)))


@dataclass(frozen=True)
class Prompts:
    """names: captions in words; labels: the place among them of each sample's; read: the embeddings
    (M, S, E) of places (M,); sha256: of what they are.
    """

    names: Sequence[str]
    labels: Labels
    read: Callable[[Tensor], Tensor]
    sha256: str


def open_prompts(
    args: argparse.Namespace, model: DiT, info: ModelInfo, device: torch.device
) -> Prompts | None:
    """--prompt; with --npz and without it, --num random captions of the set that the model was trained on; None for a
    model without captions.

    Raises ConfigError for prompts that a model of classes is given, for another encoder than the training's and for a
    set that has other captions now, and what the encoder or `captions_of` raises.
    """
    if not model.caption_dim:
        if args.prompt or args.text_encoder:
            raise ConfigError(
                "--prompt and --text-encoder are of models trained on captions, this one is not"
            )
        return None
    if args.classes or not (args.prompt or args.npz):
        raise ConfigError('the model was trained on captions: give --prompt "..." and no --classes')
    return _given(args, model, info, device) if args.prompt else _of_training(args, info)


def _given(args: argparse.Namespace, model: DiT, info: ModelInfo, device: torch.device) -> Prompts:
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
    made = encoder(args.prompt, args.prompt)
    labels = Labels.in_turn(PER_CLASS * len(made) if args.num is None else args.num, list(range(len(made))))
    return Prompts(args.prompt, labels, made.__getitem__, hashlib.sha256(made.numpy().tobytes()).hexdigest())


def _of_training(args: argparse.Namespace, info: ModelInfo) -> Prompts:
    if args.num is None:
        raise ConfigError("--npz of random captions of the training: say how many images with --num")
    source, trained = str(info.data.get("name")), info.data.get("captions")
    captions = captions_of(relocate(source, info.working_directory, info.path))
    if captions is None or captions.encoder != trained:
        raise ConfigError(
            f"{source} does not have the captions (any more) that {info.path} was trained on: give --prompt"
        )
    labels = Labels.random(args.num, args.seed, len(captions.texts))
    return Prompts(
        captions.texts,
        labels,
        lambda places: captions.read(places.tolist()).float(),
        captions.encoder["sha256"],
    )
