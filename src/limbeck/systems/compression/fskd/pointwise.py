"""The added 1x1 convolutions: how they are fitted in closed form, and merged."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from limbeck.data.data import Split
from limbeck.errors import UserError
from limbeck.systems.compression.fskd.pruning import ADDED, own_obstacle, traced
from limbeck.training.network import Network
from limbeck.training.task import Task

AT_ONCE = 128
"""Images in a batch that is only looked at."""


# Least squares.


def least_squares(gram: Tensor, cross: Tensor) -> Tensor:
    r"""The 1x1 convolution Q of the smallest error (section 3.2), from its normal equations.

    .. math:: Q = \arg\min_Q \| X_s Q^\top - X_t \|_F^2, \qquad Q^\top = X_s^+ X_t

    If the student's channels depend on each other, of all such Q the one of the least norm.

    Args:
        gram: (c, c), the student's X_s^T X_s; worked on in float64.
        cross: (c, k), X_s^T X_t with the teacher's channels that the student kept.

    Returns:
        Q, (k, c) in float64: a row for each channel that comes out, as a convolution's weight has.

    Raises:
        UserError: shapes that do not fit each other.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    >>> y = torch.tensor([[2.0, 1.0], [4.0, 6.0], [9.0, 9.0]])
    >>> least_squares(x.T @ x, x.T @ y).tolist()
    [[2.0, 2.0], [1.0, 3.0]]
    """
    if gram.ndim != 2 or cross.ndim != 2 or not gram.shape[0] == gram.shape[1] == cross.shape[0]:
        raise UserError(
            f"the student's products have the shape {tuple(gram.shape)}, those with the teacher "
            f"{tuple(cross.shape)}; they must be (c, c) and (c, k)"
        )
    a, b = gram.double(), cross.double()
    values, vectors = torch.linalg.eigh(a)
    # Eigenvalues are squares: what lies below is noise in channels that were float32 numbers.
    least = len(a) * torch.finfo(torch.float64).eps * values[-1]
    if values[0] > least:
        exact: Tensor = torch.linalg.solve(a, b).T
        return exact
    inverse = torch.where(values > least, 1 / values, 0.0)
    shortest: Tensor = ((vectors * inverse) @ (vectors.T @ b)).T
    return shortest


@dataclass
class Moments:
    """Sums over the pixels of all images, of which a block's fit is made: memory without rows.

    Attributes:
        gram: (c, c), X_s^T X_s in float64.
        cross: (c, k), X_s^T X_t.
        square: the sum of the squares of X_t.
        rows: M, pixels of all images.

    >>> moments = Moments.of(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4))
    >>> moments.rows, moments.residual(torch.eye(3))
    (32, 0.0)
    """

    gram: Tensor
    cross: Tensor
    square: float
    rows: int

    @classmethod
    def of(cls, student: Tensor, teacher: Tensor) -> Moments:
        """Of maps (B, c, H, W) and (B, k, H, W) of the same height and width.

        Raises:
            UserError: maps of another number or size of images.
        """
        if student.ndim != 4 or student.shape[:1] + student.shape[2:] != (
            teacher.shape[:1] + teacher.shape[2:]
        ):
            raise UserError(
                f"a block puts out {tuple(student.shape)} in the student and "
                f"{tuple(teacher.shape)} in the teacher; height and width must agree"
            )
        x, y = _rows(student), _rows(teacher)
        return cls(x.T @ x, x.T @ y, float(y.square().sum()), len(x))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.gram + other.gram,
            self.cross + other.cross,
            self.square + other.square,
            self.rows + other.rows,
        )

    def fit(self) -> Tensor:
        """Q of these images; see :func:`least_squares`."""
        return least_squares(self.gram, self.cross)

    def residual(self, q: Tensor) -> float:
        """The squared error that Q, (k, c), leaves: at least 0."""
        q = q.to(self.gram)
        error = ((q @ self.gram) * q).sum() - 2 * (q.T * self.cross).sum()
        return max(0.0, float(error) + self.square)


def _rows(maps: Tensor) -> Tensor:
    """Every pixel of every image as a row, (B H W, C) in float64."""
    flat = maps.detach().movedim(1, -1).flatten(0, -2)
    # Not every accelerator has float64.
    return (flat.cpu() if flat.device.type == "mps" else flat).double()


# The added convolutions.


class Recombined(nn.Module):
    """A convolution whose outputs are recombined by a 1x1 convolution, at first the identity.

    >>> block = Recombined(nn.Conv2d(3, 4, 3))
    >>> image = torch.ones(1, 3, 5, 5)
    >>> bool((block(image) == block.conv(image)).all())
    True
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        width = conv.out_channels
        # Made without drawing numbers, which would be drawn from somebody else's generator.
        self.pointwise = nn.Conv2d(width, width, 1, bias=False, device="meta")
        identity = torch.eye(width, dtype=conv.weight.dtype, device=conv.weight.device)
        self.pointwise.weight = nn.Parameter(identity.view(width, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, width, H', W')."""
        return self.pointwise(self.conv(x))  # type: ignore[no-any-return]

    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        r"""One convolution that answers the same: W'_{:,:,a,b} = Q W_{:,:,a,b}, b' = Q b."""
        conv, q = copy.deepcopy(self.conv), self.pointwise.weight.flatten(1).cpu().double()
        weight = torch.einsum("oc,cikl->oikl", q, conv.weight.cpu().double())
        conv.weight.copy_(weight)
        if conv.bias is not None:
            conv.bias.copy_(q @ conv.bias.cpu().double())
        return conv


@dataclass(frozen=True)
class Block:
    """A convolution whose outputs are fitted.

    Attributes:
        path: its place in the model.
        output: the graph's name of what it puts out.
        total: the graph's name of the sum that it goes into, where it is a branch of one.
    """

    path: str
    output: str
    total: str = ""


def blocks(model: nn.Module) -> list[Block]:
    """The convolutions behind which a 1x1 convolution may stand, in the order in which they run.

    It can be merged where nothing but the convolution is before it, which sees all channels and
    runs once. Batch norms must have been folded, as one between the two is in the way.

    >>> [block.path for block in blocks(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))]
    ['0']
    """
    graph = traced(model, (Recombined,))
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found = []
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        path = str(node.target)
        conv = isinstance(model.get_submodule(path), nn.Conv2d)
        if conv and not own_obstacle(model, path, calls, owners):
            found.append(Block(path, node.name, _total(model, node)))
    return found


def _total(model: nn.Module, node: fx.Node) -> str:
    """The name of the sum that a node goes straight into, if it does."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in ADDED:
            return user.name if len(user.all_input_nodes) == 2 else ""
        straight = user.op == "call_module" and isinstance(
            model.get_submodule(str(user.target)), (nn.Identity, nn.Dropout, nn.Dropout2d)
        )
        if not straight:
            return ""
        node = user
    return ""


def add_pointwise(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """A copy of the model with an identity 1x1 convolution behind each of these convolutions.

    >>> model = add_pointwise(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False)), ["0"])
    >>> model[0].pointwise.weight.shape
    torch.Size([8, 8, 1, 1])
    """
    grown = copy.deepcopy(model)
    for path in paths:
        conv = grown.get_submodule(path)
        assert isinstance(conv, nn.Conv2d)
        grown.set_submodule(path, Recombined(conv))
    return grown


def merge_pointwise(model: nn.Module) -> nn.Module:
    """A copy of the model with each added 1x1 convolution multiplied into the one before it.

    It answers the same, to rounding, and has the size it had before any were added.
    """
    merged = copy.deepcopy(model)
    for path, module in list(merged.named_modules()):
        if isinstance(module, Recombined):
            merged.set_submodule(path, module.merged())
    return merged


def watched(model: nn.Module, graph: fx.Graph, names: Sequence[str]) -> fx.GraphModule:
    """A module that gives what the model computes under these names of its graph, as a tuple.

    It shares the model's layers and runs no further than the last of them.
    """
    part, found = fx.Graph(), {}  # type: ignore[var-annotated]
    part.graph_copy(graph, found)
    by_name = {old.name: new for old, new in found.items()}
    wanted = []
    for name in names:
        # What stands behind may write in place.
        with part.inserting_after(by_name[name]):
            wanted.append(part.call_method("clone", (by_name[name],)))
    part.output(tuple(wanted))
    seeing = fx.GraphModule(model, part)
    seeing.graph.eliminate_dead_code()
    seeing.recompile()
    return seeing


@dataclass(frozen=True)
class Sight:
    """Student and teacher as they are looked at to fit the student's blocks.

    Attributes:
        student: the network with 1x1 convolutions added, batch norms folded, at rest.
        teacher: the whole network, folded, at rest.
        kept: by path the numbers of the teacher's channels that the student has, where it has not
            all of them.
        blocks: the convolutions that are fitted.
        sums: fit a branch so that the sum it goes into comes out right.
    """

    student: Network
    teacher: Network
    kept: Mapping[str, Tensor]
    blocks: Sequence[Block]
    sums: bool = False

    @cached_property
    def _graphs(self) -> tuple[fx.Graph, fx.Graph]:
        return traced(self.student.model, (Recombined,)), traced(self.teacher.model)

    @property
    def added(self) -> nn.ModuleDict:
        """The 1x1 convolutions, in the order of the blocks."""
        found = [self.student.model.get_submodule(block.path) for block in self.blocks]
        return nn.ModuleDict(
            {
                f"block-{place}": module.pointwise
                for place, module in enumerate(found, start=1)
                if isinstance(module, Recombined)
            }
        )

    def pairs(self, over: Sequence[Block]) -> Callable[[Tensor], list[tuple[Tensor, Tensor]]]:
        """A function of images, (B, C, H, W), to the output and the target of each block.

        The target of a branch whose sum counts is the teacher's sum less what the student adds to
        the branch. Gradients flow through the student's outputs alone.
        """
        names = [name for block in over for name in self._names(block)]
        student = alike(watched(self.student.model, self._graphs[0], names), self.student)
        teacher = alike(watched(self.teacher.model, self._graphs[1], names), self.teacher)

        def look(images: Tensor) -> list[tuple[Tensor, Tensor]]:
            with torch.no_grad():
                theirs = iter(teacher(images))
            ours, found = iter(student(images)), []
            for block in over:
                own, wanted = next(ours), next(theirs)
                if block.path in self.kept:
                    wanted = wanted[:, self.kept[block.path].to(wanted.device)]
                if len(self._names(block)) == 2:
                    wanted = next(theirs) - (next(ours) - own).detach()
                found.append((own, wanted))
            return found

        return look

    def _names(self, block: Block) -> list[str]:
        return [block.output, block.total] if self.sums and block.total else [block.output]


@torch.no_grad()
def moments_of(sight: Sight, block: Block, task: Task, images: Split) -> Moments:
    """What a block's fit is made of, on some images as they are, without their labels.

    Args:
        sight: the 1x1 convolutions of the blocks before are as they were found.
        block: one of its blocks.
        task: makes the batches; nothing is augmented.
        images: the few.
    """
    look = sight.pairs([block])
    device = next(sight.student.parameters()).device
    total: Moments | None = None
    for batch in task.batches(images, batch_size=AT_ONCE).epoch(0):
        ((own, wanted),) = look(batch["image"].to(device))
        moments = Moments.of(own, wanted)
        total = moments if total is None else total + moments
    assert total is not None, "there is an image"
    return total


def fit_block(sight: Sight, block: Block, task: Task, images: Split) -> dict[str, Any]:
    """A block's Q, float32 of shape (c, c), and its error before and after.

    Returns:
        ``q``; ``before`` and ``after``, squared errors over the squares of the target.
    """
    moments = moments_of(sight, block, task, images)
    q = moments.fit()
    whole = max(moments.square, torch.finfo(torch.float64).tiny)
    return {
        "q": q.float().cpu(),
        "before": moments.residual(torch.eye(len(q))) / whole,
        "after": moments.residual(q) / whole,
    }


def alike(model: nn.Module, network: Network, name: str = "") -> Network:
    """The model, fed as the network is."""
    found = Network(model, network.input, name, network.classes)
    return found.lay_out(network.memory_format, network.dtype)
