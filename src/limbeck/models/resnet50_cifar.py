"""ResNet-50 for small images.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, with the stem of the
CIFAR-100 comparison of Tian, Krishnan, Isola (Contrastive Representation Distillation, ICLR 2020).
"""

from __future__ import annotations

from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from limbeck.models.initialise import fan_out_normal


class SmallResNet50(ResNet):  # type: ignore[misc]
    """torchvision's ResNet-50 with the stem of a small-image network: 3x3, stride 1, no pooling.

    Convolutions start from N(0, 2 / fan-out), the classifier from PyTorch's default.

    Args:
        classes: number of outputs.
        channels: of the images, (B, channels, H, W).

    Example:
        >>> SmallResNet50(classes=10).fc.out_features
        10
    """

    stages = ("layer1", "layer2", "layer3", "layer4")

    def __init__(self, classes: int, channels: int = 3) -> None:
        super().__init__(Bottleneck, [3, 4, 6, 3], num_classes=classes)
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.maxpool = nn.Identity()
        fan_out_normal(self.conv1)
