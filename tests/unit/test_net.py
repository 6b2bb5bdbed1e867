"""The zoo has the published architectures, each split into features and head."""

from __future__ import annotations

import pytest
import torch

from configs.errors import ConfigError
from ml.model import MEAN, STD, ImageModel, Preprocess
from ml.net import ZOO, build, parameters

# Parameters at 1000 classes as published with torchvision's weights of the same architectures.
PUBLISHED = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "efficientnet_b0": 5_288_548,
    "efficientnet_b4": 19_341_616,
    "mobilenet_v3_large": 5_483_032,
    "mobilenet_v3_small": 2_542_856,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_a_net_has_as_many_parameters_as_published(name: str, count: int) -> None:
    with torch.device("meta"):
        assert parameters(ZOO[name](1000)) == count


def test_the_default_net_is_small() -> None:
    assert parameters(build("convnet", 8)) == 101_048


@pytest.mark.parametrize("name", sorted(ZOO))
def test_logits_are_the_head_of_the_embedding(name: str) -> None:
    net = build(name, 5).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        embedding, logits = net.embed(x), net(x)
        assert embedding.shape == (2, net.embedding_size)
        assert logits.shape == (2, 5)
        assert torch.equal(net.head(embedding), logits)


def test_an_unknown_net_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="efficientnet_b0"):
        build("vgg", 3)


def test_one_class_is_no_classification() -> None:
    with pytest.raises(ConfigError, match="two classes"):
        build("convnet", 1)


def test_preprocessing_subtracts_the_mean_and_divides_by_the_deviation() -> None:
    images = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    expected = ((images.double() - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    assert torch.allclose(Preprocess()(images).double(), expected, atol=1e-5)


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_memory_layout_does_not_change_the_answer(channels_last: bool) -> None:
    torch.manual_seed(0)
    net = build("convnet", 4).eval()
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = net(Preprocess()(images).contiguous())
        assert torch.allclose(ImageModel(net, channels_last=channels_last)(images), expected, atol=1e-5)
