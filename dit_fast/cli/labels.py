"""Class or caption of each sample, computed when it is read, since a request may have any number of samples."""

import difflib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dit_fast.cli.sample_options import ALL_CLASSES, PER_CLASS, SHOWN_CLASSES, SampleOptions
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
        rule: description of the labels, the same for the same labels.
        of: function of sample numbers (n,) int64 that returns their labels (n,) int64.
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
        """Random labels below `high`, each a function of the seed and the number of the sample."""
        key = keyed.key(seed, "sampling labels")
        return cls(num, f"random below {high}", lambda numbers: keyed.integers(key, numbers, high))

    def __len__(self) -> int:
        return self.num

    def first(self, most: int) -> Tensor:
        """Labels of the first `most` samples, or of all if there are fewer, int64 (n,)."""
        return self.of(torch.arange(min(most, self.num)))


@dataclass(frozen=True)
class Prompts:
    """Captions of the samples of a request.

    Args:
        names: the captions.
        labels: index of the caption of each sample.
        read: function of indices (M,) that returns their embeddings (M, S, E).
        sha256: digest of the captions.
    """

    names: Sequence[str]
    labels: Labels
    read: Callable[[Tensor], Tensor]
    sha256: str


def open_prompts(options: SampleOptions, model: DiT, info: ModelInfo, device: torch.device) -> Prompts | None:
    """Captions from --prompt, else with --npz random captions of the training set.

    Returns:
        The captions; None for a model that is not conditioned on captions.

    Raises:
        ConfigError: the model is not conditioned on captions, the encoder is not that of the training, or the captions
            of the training set have changed.
    """
    if not model.caption_dim:
        if options.prompt or options.text_encoder:
            raise ConfigError(
                "--prompt and --text-encoder apply only to models trained on captions; remove them"
            )
        return None
    if options.classes or not (options.prompt or options.npz):
        raise ConfigError('the model was trained on captions: give --prompt "..." and no --classes')
    return _given(options, model, info, device) if options.prompt else _of_training(options, info)


def _given(options: SampleOptions, model: DiT, info: ModelInfo, device: torch.device) -> Prompts:
    trained = info.data.get("captions", {})
    name = options.text_encoder or trained.get("name")
    if name is None:
        raise ConfigError(f"{info.path} does not record its text encoder: give --text-encoder")
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
    made = encoder(options.prompt, options.prompt)
    labels = Labels.in_turn(
        PER_CLASS * len(made) if options.num is None else options.num, list(range(len(made)))
    )
    return Prompts(
        options.prompt, labels, made.__getitem__, hashlib.sha256(made.numpy().tobytes()).hexdigest()
    )


def _of_training(options: SampleOptions, info: ModelInfo) -> Prompts:
    if options.num is None:
        raise ConfigError("--npz with random captions of the training: say how many images with --num")
    source, trained = str(info.data.get("name")), info.data.get("captions")
    captions = captions_of(relocate(source, info.working_directory, info.path))
    if captions is None or captions.encoder != trained:
        raise ConfigError(
            f"{source} no longer has the captions that {info.path} was trained on: give --prompt"
        )
    labels = Labels.random(options.num, options.seed, len(captions.texts))
    return Prompts(
        captions.texts,
        labels,
        lambda places: captions.read(places.tolist()).float(),
        captions.encoder["sha256"],
    )


def choose_labels(options: SampleOptions, num_classes: int, names: tuple[str, ...] | None) -> Labels:
    """Labels from --classes and --num; zeros for an unconditional model."""
    if not num_classes:
        if options.classes:
            raise ConfigError(
                f"--classes {' '.join(options.classes)}: the model is unconditional; leave it out"
            )
        return Labels.in_turn(PER_CLASS if options.num is None else options.num, [0])
    requested = options.classes or (("random",) if options.npz else ())
    if requested == ("random",):
        if options.num is None:
            raise ConfigError("--classes random: say how many images with --num")
        return Labels.random(options.num, options.seed, num_classes)
    classes = list(range(num_classes)) if requested == ("all",) else numbers_of(requested, num_classes, names)
    return Labels.in_turn(PER_CLASS * len(classes) if options.num is None else options.num, classes)


def numbers_of(requested: Sequence[str], num_classes: int, names: tuple[str, ...] | None) -> list[int]:
    """Class numbers of --classes: names, numbers, or either separated by commas."""
    if not requested:
        if num_classes <= ALL_CLASSES:
            return list(range(num_classes))
        return [round(i * (num_classes - 1) / (SHOWN_CLASSES - 1)) for i in range(SHOWN_CLASSES)]
    by_name = _numbers_by_name(names or ())
    parts: list[str] = []
    for word in requested:
        parts += [word] if word in by_name else [part.strip() for part in word.split(",") if part.strip()]
    return [_class_number(part, num_classes, by_name) for part in parts]


def _numbers_by_name(names: Sequence[str]) -> dict[str, list[int]]:
    """Classes by name, and by each part of names such as ImageNet's "tench, Tinca tinca"."""
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        for part in {name, *(part.strip() for part in name.split(","))}:
            numbers.setdefault(part, []).append(number)
    # A complete name means its class, even if it is also a part of other names.
    return {**numbers, **{name: [number] for number, name in enumerate(names)}}


def _class_number(text: str, num_classes: int, by_name: dict[str, list[int]]) -> int:
    if text in by_name:
        if len(by_name[text]) > 1:
            raise ConfigError(
                f"--classes {text}: the name of classes {' and '.join(map(str, by_name[text]))}; give the number"
            )
        return by_name[text][0]
    try:
        number = int(text)
    except ValueError:
        near = difflib.get_close_matches(text, by_name, n=3, cutoff=0.4)
        known = f"; near it: {', '.join(near)}" if near else f"; give a number from 0 to {num_classes - 1}"
        raise ConfigError(f"--classes {text}: the checkpoint has no class of that name{known}") from None
    if not 0 <= number < num_classes:
        raise ConfigError(f"--classes {number}: the model has {num_classes} classes, 0 to {num_classes - 1}")
    return number
