"""A block with all its candidates at once, what it is trained by and how candidates are rated."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.initialise import fan_out_normal
from limbeck.systems.search.dna.networks import InvertedResidual, Operation

Path = tuple[int, ...]
"""The operation of each layer, by its place among those that there are: alpha_i."""


class Supernet(nn.Module):
    """One block with every operation in each of its layers, of which a path uses one a layer.

    The first layer has the stride and takes in what the teacher's block takes in, the last one
    puts out as many channels as it puts out, and between them the block has its own width.

    Args:
        inputs, width, outputs: channels.
        stride: of the first layer.
        depth: how many layers.
        operations: the candidates of each layer.
        stem: what comes before, in the first block.

    >>> net = Supernet(8, 4, 16, 2, 2, [Operation(3, 2), Operation(5, 2)])
    >>> net(torch.zeros(1, 8, 6, 6), (0, 1)).shape, net.paths
    (torch.Size([1, 16, 3, 3]), [(0, 0), (0, 1), (1, 0), (1, 1)])
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        outputs: int,
        stride: int,
        depth: int,
        operations: Sequence[Operation],
        stem: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stem = nn.Identity() if stem is None else stem
        self.operations = tuple(operations)
        widths = pairwise([inputs, *[width] * (depth - 1), outputs])
        self.layers = nn.ModuleList(
            nn.ModuleList(
                InvertedResidual(a, b, operation, stride if number == 0 else 1)
                for operation in operations
            )
            for number, (a, b) in enumerate(widths)
        )
        fan_out_normal(self)

    @property
    def paths(self) -> list[Path]:
        """All candidates, in the order in which :func:`rate` rates them."""
        return list(product(range(len(self.operations)), repeat=len(self.layers)))

    def draw(self) -> Path:
        """A candidate drawn uniformly from torch's generator."""
        return tuple(torch.randint(len(self.operations), (len(self.layers),)).tolist())

    def forward(self, x: Tensor, path: Path) -> Tensor:
        """What the candidate makes of what the teacher's block takes in."""
        x = self.stem(x)
        for choices, chosen in zip(self.layers, path, strict=True):
            assert isinstance(choices, nn.ModuleList)
            x = choices[chosen](x)
        return x


def relative_l1(student: Tensor, teacher: Tensor) -> Tensor:
    r"""What a candidate is rated by: mean |S - T| over the deviation of T.

    Dividing makes blocks comparable, so that their ratings can be summed. The deviation is the
    unbiased one over all elements of the batch, plus 1e-9.

    Args:
        student: features of any shape.
        teacher: features of the same shape; no gradient flows into them.

    Returns:
        A scalar at least 0, in float32 or better.

    Raises:
        UserError: features of different shapes.

    >>> relative_l1(torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([0.0, 2.0, 4.0, 6.0]))
    tensor(0.1936)
    """
    s, t = _alike(student, teacher)
    return (s - t).abs().mean() / (t.std() + 1e-9)


def similarity_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    r"""How differently two networks find the samples of a batch alike (the code's ``klcos``).

    Cosines between the samples' features, moved into [0, 1], are made a distribution over the
    batch for each sample; the teacher's divergence from the student's is summed over samples.

    Args:
        student: (B, ...).
        teacher: of the same shape; no gradient flows into them.

    Returns:
        A scalar, in float32 or better; 0 where both find samples alike in the same way.

    Raises:
        UserError: features of different shapes.

    >>> similarity_divergence(torch.eye(2), torch.eye(2))
    tensor(0.)
    """
    s, t = (_likeness(features) for features in _alike(student, teacher))
    return torch.sum(t * torch.log((t + 1e-7) / (s + 1e-7)))


def _likeness(features: Tensor) -> Tensor:
    rows = features.flatten(1)
    rows = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + 1e-7)
    return F.normalize((rows @ rows.T + 1) / 2, p=1, dim=1)


def _alike(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise UserError(
            f"the student's features have the shape {tuple(student.shape)}, the teacher's "
            f"{tuple(teacher.shape)}; they must be equal"
        )
    s = student.to(torch.promote_types(student.dtype, torch.float32))
    return s, teacher.detach().to(s.dtype)


@torch.no_grad()
def rate(
    supernet: Supernet,
    given: Tensor,
    seen: Sequence[tuple[Tensor, Tensor]],
    first: int | None = None,
) -> list[float]:
    """Rate every candidate of a block: the mean of :func:`relative_l1` over some batches.

    Statistics of batch norms are a mixture over all candidates after training, so they are found
    again for each: those of one training batch. Candidates that begin alike share what their first
    layers put out, statistics included, so each layer is run once for each way to come to it.

    Args:
        supernet: its statistics are changed; it is left in eval mode.
        given: a training batch of what the teacher's block takes in.
        seen: batches of what the teacher's block takes in and puts out.
        first: rate those alone that begin with this operation.

    Returns:
        A rating for each of :attr:`Supernet.paths`, or for those that begin so.

    Raises:
        UserError: the block does not put out what the teacher's does.
    """

    def below(depth: int, given: Tensor, features: list[Tensor]) -> list[float]:
        if depth == len(supernet.layers):
            pairs = zip(features, (wanted for _, wanted in seen), strict=True)
            return [float(torch.stack([relative_l1(*pair) for pair in pairs]).mean())]
        choices = supernet.layers[depth]
        assert isinstance(choices, nn.ModuleList)
        ratings = []
        for number, operation in enumerate(choices):
            if depth or first in (None, number):
                after = _with_statistics_of(operation, given)
                ratings += below(depth + 1, after, [operation(x) for x in features])
        return ratings

    supernet.eval()
    after = _with_statistics_of(supernet.stem, given)
    return below(0, after, [supernet.stem(x) for x, _ in seen])


def _with_statistics_of(module: nn.Module, batch: Tensor) -> Tensor:
    """Give a module's batch norms the statistics of one batch; what it makes of the batch."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0
    found: Tensor = module.train()(batch)
    module.eval()
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    return found
