"""Image and latent data sets for training, with class labels or captions."""

from dit_fast.data.buckets import Size, apportion, nearest_bucket, parse_buckets
from dit_fast.data.caches import open_cache
from dit_fast.data.captions import captions_of
from dit_fast.data.datasets import BUILTIN, holds_latents, open_data, open_images, open_stream, relocate
from dit_fast.data.decode import Conversion, center_crop, center_crop_array
from dit_fast.data.images import ImageSet, Split, from_arrays, to_pixels
from dit_fast.data.latents import LatentSet, LatentStream, Posterior, encode_in_loop, open_latents
from dit_fast.data.stream import BatchStream, generator

__all__ = [
    "BUILTIN",
    "BatchStream",
    "Conversion",
    "ImageSet",
    "LatentSet",
    "LatentStream",
    "Posterior",
    "Size",
    "Split",
    "apportion",
    "captions_of",
    "center_crop",
    "center_crop_array",
    "encode_in_loop",
    "from_arrays",
    "generator",
    "holds_latents",
    "nearest_bucket",
    "open_cache",
    "open_data",
    "open_images",
    "open_latents",
    "open_stream",
    "parse_buckets",
    "relocate",
    "to_pixels",
]
