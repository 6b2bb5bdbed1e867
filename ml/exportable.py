"""The module that is written to ONNX: preprocessing, net, temperature, three outputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ml.model import Preprocess
from ml.net import Net, build


class Exportable(nn.Module):
    """Pixels uint8 [N, px, px, 3] to (probs, logits, embedding). The temperature changes the probabilities only."""

    beta: Tensor

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.preprocess = Preprocess()
        self.net = net
        self.embedding_size = net.embedding_size
        self.register_buffer("beta", torch.ones(()))

    def set_temperature(self, temperature: float) -> None:
        """Divide logits by `temperature` before the softmax."""
        self.beta.fill_(1.0 / temperature)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        embedding = self.net.embed(self.preprocess(image).contiguous())
        logits = self.net.head(embedding)
        return torch.softmax(logits * self.beta, dim=1), logits, embedding


def exportable(net: str, classes: int, weights: Mapping[str, Tensor]) -> Exportable:
    """The trained net, ready to export: in evaluation mode and plain memory layout."""
    built = build(net, classes)
    built.load_state_dict(weights)
    return Exportable(built).eval().requires_grad_(False)
