"""`find_model` and `download_model`, against a local web server; the VAE behind a stand-in for diffusers."""

import argparse
import http.server
import sys
import threading
import types

import pytest
import torch

from dit_fast import download
from dit_fast.encoders.autoencoder import LatentDecoder
from dit_fast.errors import CheckpointError, ConfigError, MissingExtraError, OutputError
from tests import latent_sets
from tests.tolerance import assert_close

STATE = {"pos_embed": torch.arange(6.0)}


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A web server in place of the published address: it answers `content`, claiming `length` bytes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.lstrip("/") not in download.pretrained_models:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(self.server.length or len(self.server.content)))
            self.end_headers()
            self.wfile.write(self.server.content)

        def log_message(self, *_):
            pass

    torch.save(STATE, tmp_path / "source.pt")
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.length = (tmp_path / "source.pt").read_bytes(), None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "_ADDRESS", f"http://127.0.0.1:{server.server_port}/")
    yield server
    server.shutdown()
    server.server_close()


def test_a_published_name_is_fetched_once(served, tmp_path):
    state = download.find_model("DiT-XL-2-256x256.pt")
    assert torch.equal(state["pos_embed"], STATE["pos_embed"])
    assert [path.name for path in (tmp_path / "pretrained_models").iterdir()] == ["DiT-XL-2-256x256.pt"]
    served.content = b"gone"
    assert torch.equal(download.download_model("DiT-XL-2-256x256.pt")["pos_embed"], STATE["pos_embed"])


def test_a_connection_that_breaks_off_leaves_nothing(served, tmp_path):
    served.length = len(served.content) + 100
    with pytest.raises(
        CheckpointError, match=r"cannot download .*DiT-XL-2-512x512\.pt .*put it at pretrained_models"
    ):
        download.find_model("DiT-XL-2-512x512.pt")
    assert list((tmp_path / "pretrained_models").iterdir()) == []


def test_offline_is_one_line(served, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_ADDRESS", "http://127.0.0.1:1/")
    with pytest.raises(CheckpointError) as error:
        download.find_model("DiT-XL-2-256x256.pt")
    assert "\n" not in str(error.value)
    assert "refused" in str(error.value)
    assert list((tmp_path / "pretrained_models").iterdir()) == []


def test_a_folder_that_cannot_be_made(served, tmp_path):
    (tmp_path / "pretrained_models").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write pretrained_models"):
        download.find_model("DiT-XL-2-256x256.pt")


def test_local_files_and_unknown_names(tmp_path):
    ema = {"pos_embed": torch.ones(6)}
    torch.save({"model": STATE, "ema": ema, "opt": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pt")
    assert torch.equal(download.find_model(str(tmp_path / "a.pt"))["pos_embed"], ema["pos_embed"])
    with pytest.raises(
        CheckpointError, match=r"no such file, and not a published model \(DiT-XL-2-256x256\.pt"
    ):
        download.find_model("DiT-XL-2-128x128.pt")
    with pytest.raises(CheckpointError, match=r"b\.pt: not a published model"):
        download.download_model("b.pt")


class Config(dict):
    """As diffusers': values by key and by attribute."""

    __getattr__ = dict.__getitem__


class StandInVae(torch.nn.Module):
    """An AutoencoderKL's interface: repeats each latent pixel 8 times and keeps the first three channels."""

    def __init__(self, config=None):
        super().__init__()
        self.config = Config(
            latent_channels=4, out_channels=3, scaling_factor=0.18215, block_out_channels=[1] * 4
        )
        self.weight = torch.nn.Parameter(torch.ones(1))

    @classmethod
    def from_config(cls, config):
        return cls(config)

    def disable_tiling(self):
        pass

    def decode(self, latents):
        pixels = latents[:, :3].repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
        return types.SimpleNamespace(sample=pixels)


def test_latents_are_unscaled_and_decoded_in_batches(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=StandInVae))
    latent_sets.save_vae(StandInVae(), tmp_path)
    latents = torch.randn(5, 4, 2, 2)
    images = LatentDecoder(str(tmp_path), 4)(latents, batch_size=2)
    assert images.shape == (5, 3, 16, 16)
    assert torch.equal(images[:, :, ::8, ::8], latents[:, :3] / 0.18215)
    with pytest.raises(ConfigError, match="has 4 latent channels, the model has 16"):
        LatentDecoder(str(tmp_path), 16)
    # By its own name too, which is what the manifest of a latent set says.
    asked = []

    def offline(model, **_):
        asked.append(model)
        raise OSError("We couldn't connect to the hub\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    for name in ("ema", "stabilityai/sd-vae-ft-ema"):
        with pytest.raises(CheckpointError, match=r"couldn't connect to the hub\); run `hf download .*$"):
            LatentDecoder(name, 4)
    assert asked == ["stabilityai/sd-vae-ft-ema"] * 2
    with pytest.raises(ConfigError, match="--vae nowhere: give ema, mse, none, or a folder"):
        LatentDecoder("nowhere", 4)


def test_a_latent_set_s_own_shift_and_scale_are_undone(tmp_path, monkeypatch):
    """A model of the set makes (z - shift) * scale; what the autoencoder's configuration says is for others."""
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=StandInVae))
    z, shift, scale = torch.randn(2, 4, 3, 3), [0.1, -0.2, 0.3, 0.0], [0.5, 2.0, 1.5, 0.18215]
    given = [torch.tensor(v).view(-1, 1, 1) for v in (shift, scale)]
    latent_sets.save_vae(StandInVae(), tmp_path)
    decoder = LatentDecoder(str(tmp_path), 4)
    assert (decoder.factor, decoder.shift, decoder.scale) == (8, (0.0,) * 4, (0.18215,) * 4)
    images = decoder((z - given[0]) * given[1], shift, scale)
    assert_close(images[:, :, ::8, ::8], z[:, :3])


def test_large_latents_are_decoded_in_tiles(tmp_path):
    """diffusers' own autoencoder: in tiles beyond 1024 pixels only, whatever was decoded before."""
    diffusers = pytest.importorskip("diffusers")
    blocks = {"up_block_types": ("UpDecoderBlock2D",), "down_block_types": ("DownEncoderBlock2D",)}
    vae = diffusers.AutoencoderKL(
        **blocks, block_out_channels=(2,), norm_num_groups=1, latent_channels=4, sample_size=32
    )
    vae.save_pretrained(tmp_path / "vae")
    decoder = LatentDecoder(str(tmp_path / "vae"), 4)
    tiled = []
    whole = decoder.vae.tiled_decode
    decoder.vae.tiled_decode = lambda z, *args, **kwargs: (
        tiled.append(z.shape[-1]) or whole(z, *args, **kwargs)
    )
    for size in (64, 136, 64):
        decoder(torch.randn(1, 4, 8, size))
    assert tiled == [136]


def test_missing_diffusers_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtraError, match=r"diffusers.* is not installed; pip install .*\[vae\]'"):
        LatentDecoder("mse", 4)
