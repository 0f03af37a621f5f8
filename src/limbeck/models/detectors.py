"""Faster R-CNN of torchvision over small trunks and large ones, fed batches of images of one size.

Ren et al., Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks, NeurIPS
2015. Samplers, coders, pooling and suppression are torchvision's.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import alexnet, detection, list_models, vgg16
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import AnchorGenerator, concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign

from limbeck.errors import UserError, did_you_mean
from limbeck.models.initialise import fan_out_normal
from limbeck.models.input import Input
from limbeck.models.libraries import Offer, Order, Way

NAMES = {
    "rcnn-8-16-32-32-64": "four stages of these widths and fully connected layers of 64 units "
    "(any rcnn-W1-...-UNITS)",
    "rcnn-vgg16": "VGG-16, as Faster R-CNN was published",
    "rcnn-alexnet": "AlexNet, of one tower",
}
"""Limbeck's own detectors by name; torchvision's are fasterrcnn_..."""

Boxes = list[Tensor]
"""Boxes (n, 4) of each image: left, top, right and bottom in pixels."""


@dataclass(frozen=True)
class Asked:
    """What a detector is asked about images, (B, 3, H, W), beside what it would find in them.

    Attributes:
        boxes: the true ones, (B, G, 4), which anchors and proposals are matched with.
        labels: what is in them, (B, G): class number + 1, or 0 where there is none.
        proposals: (P, 5), each with its image's number before its corners: the region head
            is to judge these, and not the detector's own.
    """

    images: Tensor
    boxes: Tensor | None = None
    labels: Tensor | None = None
    proposals: Tensor | None = None


@dataclass(frozen=True)
class BoxedInput(Input):
    """What a detector is fed: images of a size and normalisation, and questions about them."""

    kind = "boxed"

    def __call__(self, view: Any) -> Any:
        """Turn images, (B, 3, H, W) in [0, 1], or what is asked about them into the model's input.

        Boxes scale with their images.
        """
        if not isinstance(view, Asked):
            return super().__call__(view)
        scale = self.scale(view.images)
        boxes, proposals = view.boxes, view.proposals
        if boxes is not None:
            boxes = boxes * scale
        if proposals is not None:
            proposals = torch.cat([proposals[:, :1], proposals[:, 1:] * scale], 1)
        return replace(view, images=super().__call__(view.images), boxes=boxes, proposals=proposals)

    def scale(self, view: Tensor) -> Tensor:
        """What corners in a view are multiplied by to be corners in the model's input, (4,)."""
        height, width = view.shape[-2:]
        return view.new_tensor([self.size[1] / width, self.size[0] / height] * 2)

    def describe(self) -> str:
        return f"images of {self.size[0]} x {self.size[1]} pixels with boxes"

    def offers(self) -> Mapping[str, Callable[[Order], Offer]]:
        return {"": _own, "torchvision": _torchvision}

    def check(self, output: Any, classes: int) -> None:
        if not isinstance(output, list) or set(output[0]) != {"boxes", "labels", "scores"}:
            raise ValueError("it puts out no boxes with labels and scores")


class Detector(nn.Module):
    """A Faster R-CNN of torchvision, asked for what its heads say as well as for what it finds.

    Its parameters have torchvision's names.

    Args:
        made: whose trunk and heads it takes; its own resizing and normalisation are left behind.
    """

    def __init__(self, made: FasterRCNN) -> None:
        super().__init__()
        self.backbone = made.backbone
        self.rpn = made.rpn
        self.roi_heads = made.roi_heads

    def forward(self, asked: Tensor | Asked) -> Any:
        """What is found in images, or what the heads say.

        Args:
            asked: images, (B, 3, H, W), or a question about some.

        Returns:
            Of images a list of ``boxes`` (n, 4), ``labels`` (n,) and ``scores`` (n,) for each. Of
            a question tensors by name, for A anchors an image, P proposals and C classes:
            ``objectness`` (B, A), ``offsets`` (B, A, 4), ``proposals`` (P, 5), ``logits``
            (P, C + 1), the background's first, and ``corrections`` (P, C + 1, 4), offsets of the
            corners for each class. In training mode and with true boxes they are sampled as
            Faster R-CNN does, and there are ``anchor_label`` (B, A), 1 or 0 or -1 where not
            sampled, ``anchor_target`` (B, A, 4), ``label`` (P,) and ``target`` (P, 4).
        """
        images = asked if isinstance(asked, Tensor) else asked.images
        features = self.backbone(images)
        if isinstance(features, Tensor):
            features = OrderedDict([("0", features)])
        sizes = [(images.shape[2], images.shape[3])] * len(images)
        listed = ImageList(images, sizes)
        if isinstance(asked, Tensor):
            was_training = self.training
            self.eval()  # torchvision wants the truth in training mode
            proposals, _ = self.rpn(listed, features)
            found, _ = self.roi_heads(features, proposals, sizes)
            self.train(was_training)
            return found
        objectness, offsets, anchors, own = self._propose(listed, features)
        said = {"objectness": objectness, "offsets": offsets}
        if asked.proposals is not None:
            of = asked.proposals[:, 0]
            own = [asked.proposals[of == n, 1:].to(images.dtype) for n in range(len(images))]
        elif self.training and asked.boxes is not None and asked.labels is not None:
            matched, own = self._match(anchors, own, asked.boxes, asked.labels)
            said |= matched
        pooled = self.roi_heads.box_roi_pool(features, own, sizes)
        logits, corrections = self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))
        numbered = [
            torch.cat([boxes.new_full((len(boxes), 1), n), boxes], 1) for n, boxes in enumerate(own)
        ]
        return said | {
            "proposals": torch.cat(numbered),
            "logits": logits,
            "corrections": corrections.view(len(logits), -1, 4),
        }

    def _propose(
        self, images: ImageList, features: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Boxes, Boxes]:
        """What the proposal network says of each anchor, the anchors, and its best proposals."""
        rpn, maps = self.rpn, list(features.values())
        objectness, offsets = rpn.head(maps)
        # Corners stay in full precision, whatever the trunk is rounded to.
        anchors = rpn.anchor_generator(images, [m.float() for m in maps])
        levels = [level[0].numel() for level in objectness]
        flat, offsets = concat_box_prediction_layers(objectness, offsets)
        number = len(anchors)
        boxes = rpn.box_coder.decode(offsets.detach().float(), anchors).view(number, -1, 4)
        proposals, _ = rpn.filter_proposals(boxes, flat.detach(), images.image_sizes, levels)
        return flat.view(number, -1), offsets.view(number, -1, 4), anchors, proposals

    def _match(
        self, anchors: Boxes, proposals: Boxes, boxes: Tensor, labels: Tensor
    ) -> tuple[dict[str, Tensor], Boxes]:
        """Sample anchors and proposals, each with what it should be."""
        rpn, heads = self.rpn, self.roi_heads
        targets = [
            {"boxes": own[there > 0], "labels": there[there > 0]}
            for own, there in zip(boxes, labels, strict=True)
        ]
        wanted, nearest = rpn.assign_targets_to_anchors(anchors, targets)
        offsets = rpn.box_coder.encode(nearest, anchors)
        chosen = [
            torch.stack(mask).bool().any(0) for mask in zip(*rpn.fg_bg_sampler(wanted), strict=True)
        ]
        sampled = torch.where(torch.stack(chosen), torch.stack(wanted).long(), -1)
        own, _, label, target = heads.select_training_samples(proposals, targets)
        return {
            "anchor_label": sampled,
            "anchor_target": torch.stack(offsets),
            "label": torch.cat(label),
            "target": torch.cat(target),
        }, own


def _own(order: Order) -> Offer:
    if order.pretrained:
        raise UserError(f"Limbeck ships no weights for {order.name}; train it")
    outputs = len(order.classes) + 1
    match = re.fullmatch(r"rcnn((?:-[1-9]\d*){2,})", order.name)
    if match is not None:
        *widths, units = (int(n) for n in match[1].split("-")[1:])
        if len(widths) > 6:
            raise UserError(f"{order.name}: a trunk has at most 6 stages; {_known()}")
        return Offer([Way(lambda: small(widths, units, outputs), order.input)])
    if order.name in ("rcnn-vgg16", "rcnn-alexnet"):
        published = order.name.removeprefix("rcnn-")
        return Offer([Way(lambda: large(published, outputs), order.input)])
    raise UserError(f"there is no detector named {order.name!r}; {_known()}")


def _known() -> str:
    return did_you_mean("", NAMES)


def _torchvision(order: Order) -> Offer:
    names = [n for n in list_models(module=detection) if n.startswith("fasterrcnn")]
    if order.name not in names:
        raise UserError(
            f"torchvision has no Faster R-CNN named {order.name!r}; "
            + did_you_mean(order.name, names)
        )
    make = getattr(detection, order.name)
    weights = "DEFAULT" if order.pretrained else None

    def made() -> Detector:
        found = make(weights=weights, weights_backbone=None)
        features = found.roi_heads.box_predictor.cls_score.in_features
        found.roi_heads.box_predictor = FastRCNNPredictor(features, len(order.classes) + 1)
        return Detector(found)

    return Offer([Way(made, order.input)], loaded=order.pretrained)


SMALL = {
    "rpn_batch_size_per_image": 64,
    "box_batch_size_per_image": 32,
    "rpn_pre_nms_top_n_train": 200,
    "rpn_post_nms_top_n_train": 100,
    "rpn_pre_nms_top_n_test": 200,
    "rpn_post_nms_top_n_test": 60,
    "box_detections_per_img": 60,
}
"""How many anchors and proposals are looked at in small images."""
SIZES = (12, 24, 48)
"""Sides of the anchors of small detectors, in pixels."""
RATIOS = (0.5, 1.0, 2.0)
POOLED = 5
"""Height and width that a region's features are pooled to; small things cover few cells."""


def small(widths: Sequence[int], units: int, outputs: int) -> Detector:
    """A detector over a trunk of stages of two convolutions, for images of a few hundred pixels.

    The first three stages halve height and width. There are nine anchors a cell.

    Args:
        widths: channels of each stage.
        units: of the two fully connected layers of the region head.
        outputs: classes, the background among them.

    >>> sum(p.numel() for p in small((8, 16, 32, 32), 64, 4).parameters())
    104313
    """
    trunk = nn.Sequential()
    before = 3
    for number, width in enumerate(widths):
        layers: list[nn.Module] = []
        for place in range(2):
            stride = 2 if place == 0 and number < 3 else 1
            layers += [
                nn.Conv2d(before, width, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            before = width
        trunk.add_module(f"stage{number + 1}", nn.Sequential(*layers))
    fan_out_normal(trunk)
    head = nn.Sequential(
        nn.Flatten(),
        nn.Linear(before * POOLED**2, units),
        nn.ReLU(),
        nn.Linear(units, units),
        nn.ReLU(),
    )
    return _assembled(trunk, before, POOLED, head, units, outputs, SIZES, samples=1, **SMALL)


def large(name: str, outputs: int) -> Detector:
    """A detector over a published classifier, whose fully connected layers are its region head.

    Args:
        name: ``vgg16`` or ``alexnet``; trunks without their last pooling, of stride 16.
        outputs: classes, the background among them.
    """
    made = (vgg16 if name == "vgg16" else alexnet)(weights=None)
    *trunk, _ = made.features
    layers = made.classifier[:-1]
    side, channels = made.avgpool.output_size[0], 512 if name == "vgg16" else 256
    head = nn.Sequential(nn.Flatten(), *layers)
    return _assembled(nn.Sequential(*trunk), channels, side, head, 4096, outputs, (128, 256, 512))


def _assembled(
    trunk: nn.Module,
    channels: int,
    side: int,
    head: nn.Module,
    units: int,
    outputs: int,
    sizes: tuple[int, ...],
    samples: int = 2,
    **numbers: int,
) -> Detector:
    trunk.out_channels = channels  # type: ignore[assignment]
    return Detector(
        FasterRCNN(
            trunk,
            rpn_anchor_generator=AnchorGenerator((sizes,), (RATIOS,)),
            box_roi_pool=MultiScaleRoIAlign(["0"], side, sampling_ratio=samples),
            box_head=head,
            box_predictor=FastRCNNPredictor(units, outputs),
            **numbers,
        )
    )
