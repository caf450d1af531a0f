"""The one default of guidance: where weights come from decides the channels, the null class the scale."""

import pytest

from dit_fast.interop import DIFFUSERS, load_model, save_diffusers
from dit_fast.interop.guidance import default_guidance
from dit_fast.sampling import Guidance
from tests.small_models import small_model


@pytest.mark.parametrize(
    ("channels", "trained_here", "guided"),
    [(4, False, 3), (4, True, None), (3, False, None), (32, False, None), (16, True, None)],
)
def test_channels_by_origin(channels, trained_here, guided):
    model = small_model(in_channels=channels)
    assert default_guidance(model, trained_here) == Guidance(4.0, guided)


@pytest.mark.parametrize("options", [{"num_classes": 0}, {"class_dropout_prob": 0.0}])
def test_no_guidance_without_a_null_class(options):
    assert not default_guidance(small_model(**options), trained_here=True).active


def test_diffusers_guides_all_channels(tmp_path):
    save_diffusers(small_model(), tmp_path, conventions=DIFFUSERS)
    assert default_guidance(load_model(tmp_path)[0], trained_here=False).channels is None


def test_the_summary_counts_channels():
    assert Guidance(4.0, 3).summary(4) == "guidance 4 on 3 of 4 channels"
    assert Guidance(1.5, None).summary(4) == Guidance(1.5, 7).summary(4) == "guidance 1.5 on all channels"
    assert Guidance(1.0, 3).summary(4) == "no guidance"
