"""Learning Multiple Layers of Features from Tiny Images. Krizhevsky, 2009 (technical report,
University of Toronto).

The report brought CIFAR-10 and CIFAR-100 (:mod:`limbeck.data.formats`), and asked how a restricted
Boltzmann machine learns good filters from small colour images without labels. Images are whitened
by ZCA without their least principal components, which are noise. Machines of Gaussian visible
units are trained by contrastive divergence on patches first, since on whole images they found
nothing meaningful, then merged into one over the whole image, which is trained on. Its hidden
probabilities are the features that a logistic regression reads, or the first layer of a network.

Needs: images whose sides are multiples of the patch's. Labels are read by the last layer alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.errors import UserError, did_you_mean
from limbeck.training.bench import Bench
from limbeck.training.finding import Chart, Finding
from limbeck.training.method import Phases, Supervised
from limbeck.training.network import Network
from limbeck.training.phases import Fit, Journal, Solve, Training, Update
from limbeck.training.seeding import derive
from limbeck.training.task import Answer, Batch, Terms

MOST = 64 * 64 * 3
"""The most numbers in an image: ZCA decomposes a matrix of so many rows and columns."""
NOTHING = 1e-6
"""A component whose variance is this share of the largest is rounding: nothing to divide by."""
REMEMBERED = 2**30
"""The most bytes of whitened images, or of features, that are kept rather than made again."""
WATCHED = 512
"""So many images are reconstructed after every epoch to see how well that goes."""

Whole = Annotated[int, Field(ge=0, le=10**6)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


# Whitening


class ZCA(nn.Module):
    r"""Whitening that stays as near to the image as it can, without the least components.

    With covariance :math:`\Sigma = P \Lambda P^\top` and the components in K kept,

    .. math:: W = P_K (\Lambda_K + \epsilon)^{-1/2} P_K^\top, \qquad y = W (x - \mu)

    which is the report's :math:`\sqrt{n - 1}\, P D^{-1/2} P^\top` of :math:`X X^\top = P D P^\top`.
    Before :meth:`fit` it changes nothing.

    Args:
        features: numbers in a sample, d.

    Attributes:
        mean: (d,).
        basis: P, (d, d), a component a column, that of the largest variance first.
        variances: the components', (d,), in descending order.
        dropped: how many of the last components are left out; a whole number.
        eps: what is added to a variance.

    >>> rows = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> zca = ZCA(2).fit(rows)
    >>> zca(rows[:1]), zca.whitening.diagonal()
    (tensor([[1.2247, 0.0000]]), tensor([0.6124, 1.2247]))
    """

    mean: Tensor
    basis: Tensor
    variances: Tensor
    dropped: Tensor
    eps: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("basis", torch.eye(features))
        self.register_buffer("variances", torch.ones(features))
        self.register_buffer("dropped", torch.zeros((), dtype=torch.int64))
        self.register_buffer("eps", torch.zeros(()))

    @torch.no_grad()
    def fit(self, samples: Tensor | Iterable[Tensor], dropped: int = 0, eps: float = 0.0) -> ZCA:
        """Learn the components of these samples.

        Args:
            samples: (N, d), or such batches one after another; two samples at least.
            dropped: components left out, those of least variance, in [0, d).
            eps: added to the variances, at least 0.

        Raises:
            UserError: a number out of range; too few samples; components that would be kept and
                have no variance to divide by.
        """
        d = len(self.mean)
        if not 0 <= dropped < d or not 0 <= eps < math.inf:
            raise UserError(
                f"ZCA of {d:,} numbers drops 0 to {d - 1:,} components and adds an eps of at least "
                f"0, not {dropped} and {eps}"
            )
        mean, covariance = moments([samples] if isinstance(samples, Tensor) else samples)
        if covariance.shape != (d, d):
            raise UserError(f"ZCA of {d:,} numbers cannot read samples of {len(mean):,}")
        # Twice as slow in float64, which small matrices can afford.
        precise = covariance if d <= 1024 else covariance.float()
        variances, basis = (x.flip(-1) for x in torch.linalg.eigh(precise))
        kept = d - dropped
        empty = int((variances[:kept] <= NOTHING * variances[0]).sum())
        if empty and not eps:
            raise UserError(
                f"{empty:,} of the {kept:,} components to be kept have no variance; drop "
                f"{dropped + empty:,} of {d:,}, or give an eps above 0"
            )
        self.mean.copy_(mean)
        self.basis.copy_(basis)
        self.variances.copy_(variances.clamp(min=0))
        self.dropped.fill_(dropped)
        self.eps.fill_(eps)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Whiten samples, (B, d)."""
        return self._scaled(x - self.mean, -0.5)

    def inverse(self, y: Tensor) -> Tensor:
        """Samples, (B, d), from whitened ones; what was dropped comes back as the mean."""
        return self._scaled(y, 0.5) + self.mean

    @property
    def whitening(self) -> Tensor:
        """W, (d, d), symmetric."""
        return self._scaled(torch.eye(len(self.mean)).to(self.mean), -0.5)

    @property
    def dewhitening(self) -> Tensor:
        """The inverse of W on the components that are kept, (d, d), symmetric."""
        return self._scaled(torch.eye(len(self.mean)).to(self.mean), 0.5)

    @property
    def kept(self) -> int:
        """How many components are kept."""
        return len(self.mean) - int(self.dropped)

    @property
    def lost(self) -> float:
        """The share of the variance that the dropped components hold."""
        return float(self.variances[self.kept :].sum() / self.variances.sum())

    def remaining(self) -> Tensor:
        """The square root of the whitened samples' covariance, (d, kept); W's own if eps is 0."""
        kept = self.variances[: self.kept]
        return self.basis[:, : self.kept] * (kept / (kept + self.eps)).sqrt()

    def _scaled(self, x: Tensor, power: float) -> Tensor:
        basis = self.basis[:, : self.kept]
        return x @ basis * (self.variances[: self.kept] + self.eps) ** power @ basis.mT


def moments(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean, (d,), and unbiased covariance, (d, d), over batches of (B, d), both in float64.

    >>> moments([torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0]])])
    (tensor([2.], dtype=torch.float64), tensor([[4.]], dtype=torch.float64))
    """
    number = 0
    total: Tensor | float = 0.0
    products: Tensor | float = 0.0
    origin: Tensor | None = None
    for batch in batches:
        # Near the mean, so that products are no large numbers that cancel.
        origin = batch.mean(0) if origin is None else origin
        centred = batch - origin
        total = total + centred.sum(0).double()
        products = products + (centred.mT @ centred).double()
        number += len(batch)
    if number < 2 or not isinstance(total, Tensor) or origin is None:
        raise UserError(f"a covariance takes two samples or more, not {number}")
    mean = total / number
    return origin.double() + mean, (products - number * torch.outer(mean, mean)) / (number - 1)


# Restricted Boltzmann machines


class BernoulliRBM(nn.Module):
    r"""A machine of binary units: :math:`E(v, h) = -v^\top W h - b^\top v - c^\top h`.

    Randomness comes from torch's global generator.

    Args:
        visible, hidden: units, V and H.
        copies: so many independent machines side by side; shapes then begin with K.

    Attributes:
        weight: W, (V, H) or (K, V, H), from N(0, 0.01^2).
        visible_bias, hidden_bias: b and c, zeros.

    >>> rbm = BernoulliRBM(3, 2)
    >>> rbm(torch.zeros(4, 3)).shape, rbm.visible(torch.zeros(4, 2)).shape
    (torch.Size([4, 2]), torch.Size([4, 3]))
    """

    def __init__(self, visible: int, hidden: int, copies: int | None = None) -> None:
        super().__init__()
        leading = () if copies is None else (copies,)
        self.weight = nn.Parameter(0.01 * torch.randn(*leading, visible, hidden))
        self.visible_bias = nn.Parameter(torch.zeros(*leading, visible))
        self.hidden_bias = nn.Parameter(torch.zeros(*leading, hidden))

    def forward(self, v: Tensor) -> Tensor:
        """P(h = 1 | v), (..., B, H), of visible units (..., B, V)."""
        return torch.sigmoid(self.hidden_input(v))

    def hidden_input(self, v: Tensor) -> Tensor:
        """c + W' v, (..., B, H)."""
        return self.hidden_bias.unsqueeze(-2) + self._scaled(v) @ self.weight

    def visible(self, h: Tensor) -> Tensor:
        """The mean of v given hidden units (..., B, H)."""
        return torch.sigmoid(self.visible_bias.unsqueeze(-2) + h @ self.weight.mT)

    def sample_hidden(self, v: Tensor) -> Tensor:
        """Binary hidden units, each drawn by itself."""
        return torch.bernoulli(self(v))

    def sample_visible(self, h: Tensor) -> Tensor:
        """Visible units drawn given the hidden ones."""
        return torch.bernoulli(self.visible(h))

    def free_energy(self, v: Tensor) -> Tensor:
        r""":math:`-\log \sum_h e^{-E(v, h)}`, (..., B)."""
        linear = (v * self.visible_bias.unsqueeze(-2)).sum(-1)
        return -linear - F.softplus(self.hidden_input(v)).sum(-1)

    @torch.no_grad()
    def gibbs(self, v: Tensor, steps: int = 1, noise: bool = True) -> Tensor:
        """Visible units after so many alternations of sampled h and v.

        Without ``noise`` v is its mean; h is always sampled.
        """
        for _ in range(steps):
            h = self.sample_hidden(v)
            v = self.sample_visible(h) if noise else self.visible(h)
        return v

    def reconstruct(self, v: Tensor) -> Tensor:
        """The mean of v given the hidden probabilities, with no randomness."""
        return self.visible(self(v))

    def _scaled(self, v: Tensor) -> Tensor:
        return v


class GaussianBernoulliRBM(BernoulliRBM):
    r"""A machine of Gaussian visible and binary hidden units.

    .. math::
        E = \sum_i \frac{(v_i - b_i)^2}{2 \sigma_i^2} - \sum_j c_j h_j
        - \sum_{ij} \frac{v_i}{\sigma_i} h_j w_{ij}

    so that :math:`P(h_j = 1 | v) = \mathrm{sigmoid}(c_j + \sum_i w_{ij} v_i / \sigma_i)` and v
    given h has the mean :math:`b_i + \sigma_i \sum_j w_{ij} h_j` and the deviation
    :math:`\sigma_i`.

    Args:
        visible, hidden, copies: as of :class:`BernoulliRBM`.
        sigma: the deviations, a number or (V,) or (K, V); fixed unless ``learn_sigma``.
        learn_sigma: learn their logarithms with the rest.

    >>> rbm = GaussianBernoulliRBM(1, 1)
    >>> with torch.no_grad():
    ...     _ = rbm.weight.fill_(0.5), rbm.visible_bias.fill_(1.0)
    >>> v = torch.tensor([[2.0]])
    >>> with torch.no_grad():
    ...     rbm(v), rbm.visible(torch.ones(1, 1)), rbm.free_energy(v)
    (tensor([[0.7311]]), tensor([[1.5000]]), tensor([-0.8133]))
    """

    log_sigma: Tensor

    def __init__(
        self,
        visible: int,
        hidden: int,
        copies: int | None = None,
        sigma: float | Tensor = 1.0,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__(visible, hidden, copies)
        start = torch.zeros_like(self.visible_bias.detach())
        if learn_sigma:
            self.log_sigma = nn.Parameter(start)
        else:
            self.register_buffer("log_sigma", start)
        self.set_sigma(sigma)

    @torch.no_grad()
    def set_sigma(self, sigma: float | Tensor) -> None:
        """Put in other deviations, above 0."""
        wanted = torch.as_tensor(sigma, dtype=self.log_sigma.dtype, device=self.log_sigma.device)
        if not bool((wanted > 0).all()):
            raise UserError("a Gaussian unit has a deviation above 0")
        self.log_sigma.copy_(wanted.log().expand_as(self.log_sigma))

    @property
    def sigma(self) -> Tensor:
        """The deviations, of the shape of the visible biases."""
        return self.log_sigma.exp()

    def visible(self, h: Tensor) -> Tensor:
        given = h @ self.weight.mT * self.sigma.unsqueeze(-2)
        return self.visible_bias.unsqueeze(-2) + given

    def sample_visible(self, h: Tensor) -> Tensor:
        mean = self.visible(h)
        return mean + self.sigma.unsqueeze(-2) * torch.randn_like(mean)

    def free_energy(self, v: Tensor) -> Tensor:
        away = (v - self.visible_bias.unsqueeze(-2)) / self.sigma.unsqueeze(-2)
        return 0.5 * away.square().sum(-1) - F.softplus(self.hidden_input(v)).sum(-1)

    def _scaled(self, v: Tensor) -> Tensor:
        return v / self.sigma.unsqueeze(-2)


def contrastive_divergence(
    rbm: BernoulliRBM,
    v: Tensor,
    steps: int = 1,
    noise: bool = True,
    reconstruction: Tensor | None = None,
) -> Tensor:
    r"""A scalar whose descent is contrastive divergence: mean of F(data) - F(reconstruction).

    The gradient of a free energy is minus the statistics with hidden probabilities, so that a step
    of rate :math:`\varepsilon` down this scalar is the update

    .. math:: \Delta w_{ij} = \varepsilon (E_{data}[v_i h_j / \sigma_i] - E_N[v_i h_j / \sigma_i])

    and alike for biases and deviations. Sampled binary h drive the reconstruction, through which
    no gradient flows. The scalar itself is no likelihood.

    Args:
        rbm: one machine, or K side by side, whose scalars are added.
        v: data, (B, V) or (K, B, V).
        steps: N, alternations of Gibbs sampling from the data on.
        noise: sample the visible units, rather than take their means.
        reconstruction: to be used instead of sampling one.

    >>> rbm, v = BernoulliRBM(3, 2), torch.ones(4, 3)
    >>> contrastive_divergence(rbm, v, reconstruction=v).item()
    0.0
    """
    # Free energies are large sums whose differences bfloat16 would drown.
    with torch.autocast(v.device.type, enabled=False):
        v = v.detach()
        away = rbm.gibbs(v, steps, noise) if reconstruction is None else reconstruction.detach()
        return (rbm.free_energy(v) - rbm.free_energy(away)).mean(-1).sum()


class DBN(nn.Module):
    """Machines in a stack: each is trained on what the one below makes of the data.

    Args:
        *rbms: from the data upwards; each has as many visible units as the one below hidden ones.

    >>> dbn = DBN(GaussianBernoulliRBM(6, 4), BernoulliRBM(4, 2))
    >>> dbn(torch.zeros(5, 6)).shape, dbn.reconstruct(torch.zeros(5, 6)).shape
    (torch.Size([5, 2]), torch.Size([5, 6]))
    """

    def __init__(self, *rbms: BernoulliRBM) -> None:
        super().__init__()
        for number, (below, above) in enumerate(pairwise(rbms), start=2):
            if below.weight.shape[-1] != above.weight.shape[-2]:
                raise UserError(
                    f"machine {number} of the stack has {above.weight.shape[-2]} visible units, "
                    f"but the one below has {below.weight.shape[-1]} hidden ones"
                )
        self.rbms = nn.ModuleList(rbms)

    def machines(self) -> list[BernoulliRBM]:
        """The machines, from the data upwards."""
        return [rbm for rbm in self.rbms if isinstance(rbm, BernoulliRBM)]

    def up(self, v: Tensor, level: int) -> Tensor:
        """What machine ``level`` sees, 0 being the data: the hidden probabilities below it."""
        for rbm in self.machines()[:level]:
            v = rbm(v)
        return v

    def forward(self, v: Tensor) -> Tensor:
        """The hidden probabilities of the topmost machine."""
        return self.up(v, len(self.rbms))

    def divergence(self, v: Tensor, level: int, steps: int = 1) -> Tensor:
        """Contrastive divergence of machine ``level``; those below it are left as they are."""
        with torch.no_grad():
            seen = self.up(v, level)
        return contrastive_divergence(self.machines()[level], seen, steps)

    def reconstruct(self, v: Tensor) -> Tensor:
        """The data's means given the topmost probabilities, passed down by means."""
        h: Tensor = self(v)
        for rbm in reversed(self.machines()):
            h = rbm.visible(h)
        return h


# Patches


@dataclass(frozen=True)
class Layout:
    """Where the patches of an image lie: a grid of squares, and the whole image made as small.

    Args:
        channels, size: of the image.
        patch: side of a square; the image's sides are multiples of it.
        grid: squares a side, spread evenly from border to border.

    >>> Layout(3, (32, 32), 8, 5).corners[:6]
    [(0, 0), (0, 6), (0, 12), (0, 18), (0, 24), (6, 0)]
    """

    channels: int
    size: tuple[int, int]
    patch: int
    grid: int

    def __post_init__(self) -> None:
        if self.patch < 1 or self.grid < 1 or any(side % self.patch for side in self.size):
            raise UserError(
                f"a grid of {self.grid} x {self.grid} patches of {self.patch} x {self.patch} "
                f"pixels does not fit images of {self.size[0]} x {self.size[1]}, whose sides must "
                "be multiples of the patch's"
            )

    @property
    def corners(self) -> list[tuple[int, int]]:
        """Top and left of each square, row by row."""
        tops, lefts = (self._spread(side) for side in self.size)
        return [(top, left) for top in tops for left in lefts]

    def _spread(self, side: int) -> list[int]:
        room = side - self.patch
        if self.grid == 1:
            return [room // 2]
        return [round(i * room / (self.grid - 1)) for i in range(self.grid)]

    @property
    def shrink(self) -> tuple[int, int]:
        """Pixels down and across that one of the small whole image stands for."""
        return self.size[0] // self.patch, self.size[1] // self.patch

    @property
    def machines(self) -> int:
        """One a square, and one for the small whole image."""
        return self.grid**2 + 1

    @property
    def visible(self) -> int:
        """Numbers in a patch."""
        return self.channels * self.patch**2

    def cut(self, images: Tensor) -> Tensor:
        """Squares and last the small whole image, (K, B, visible), of (B, C, H, W) or (B, C*H*W).

        >>> Layout(1, (4, 4), 2, 1).cut(torch.arange(16.0).view(1, 1, 4, 4)).tolist()
        [[[5.0, 6.0, 9.0, 10.0]], [[2.5, 4.5, 10.5, 12.5]]]
        """
        images = images.view(-1, self.channels, *self.size)
        p = self.patch
        squares = [images[:, :, t : t + p, x : x + p].flatten(1) for t, x in self.corners]
        return torch.stack([*squares, F.avg_pool2d(images, self.shrink).flatten(1)])

    def deviations(self, zca: ZCA) -> Tensor:
        """What each patch's numbers deviate by once whitened, one for all squares: (K, 1).

        Dropping components takes variance away, and averages of whitened pixels have little.
        """
        root = zca.remaining().mT  # each row an image, whose squares add up to the variances
        cut = self.cut(root).square().sum(1).mean(1).sqrt()
        squares = cut[:-1].square().mean().sqrt()
        return torch.stack([*[squares] * self.grid**2, cut[-1]])[:, None]


class PatchRBM(nn.Module):
    """A bank of independent machines, one for each patch of a layout, trained side by side.

    Args:
        layout: where the patches lie.
        hidden: units of each machine.
        sigma: deviations of the visible units, a number or (K, 1).

    >>> bank = PatchRBM(Layout(3, (32, 32), 8, 5), hidden=4)
    >>> bank.rbm.weight.shape, bank(torch.zeros(2, 3, 32, 32)).shape
    (torch.Size([26, 192, 4]), torch.Size([26, 2, 4]))
    """

    def __init__(self, layout: Layout, hidden: int, sigma: float | Tensor = 1.0) -> None:
        super().__init__()
        self.layout = layout
        self.rbm = GaussianBernoulliRBM(layout.visible, hidden, layout.machines, sigma)

    def forward(self, images: Tensor) -> Tensor:
        """Hidden probabilities, (K, B, hidden), of whitened images."""
        return torch.sigmoid(self.rbm.hidden_input(self.layout.cut(images)))


@torch.no_grad()
def merge_patch_rbms(bank: PatchRBM, sigma: float | Tensor = 1.0) -> GaussianBernoulliRBM:
    """One machine over the whole image whose hidden units are those of all machines of a bank.

    A square's weights lie at its pixels, zeros elsewhere. Those of the small whole image are
    copied to all pixels that one of its pixels averages, divided by their number. A hidden unit's
    input is what it was. A visible bias is the mean of those of the squares over the pixel, or of
    the small image's where there is none.

    Args:
        bank: K machines of n hidden units.
        sigma: deviations of the merged machine's visible units.

    Returns:
        C*H*W visible units and K*n hidden ones, machine by machine.

    >>> merge_patch_rbms(PatchRBM(Layout(3, (32, 32), 8, 5), hidden=4)).weight.shape
    torch.Size([3072, 104])
    """
    layout, rbm = bank.layout, bank.rbm
    n, p = rbm.weight.shape[-1], layout.patch
    shape = (layout.channels, *layout.size)
    merged = GaussianBernoulliRBM(math.prod(shape), layout.machines * n, sigma=sigma)
    merged.to(rbm.weight)
    per_pixel = (rbm.weight / rbm.sigma[..., None]).view(-1, layout.channels, p, p, n)
    bias = rbm.visible_bias.view(-1, layout.channels, p, p)
    weight = per_pixel.new_zeros(layout.machines, n, *shape)
    total, times = bias.new_zeros(shape), bias.new_zeros(shape)
    for k, (top, left) in enumerate(layout.corners):
        place = (..., slice(top, top + p), slice(left, left + p))
        weight[k][place] = per_pixel[k].permute(3, 0, 1, 2)
        total[place] += bias[k]
        times[place] += 1
    down, across = layout.shrink

    def spread(small: Tensor) -> Tensor:
        return small.repeat_interleave(down, -2).repeat_interleave(across, -1)

    weight[-1] = spread(per_pixel[-1].permute(3, 0, 1, 2)) / (down * across)
    mean = torch.where(times > 0, total / times.clamp(min=1), spread(bias[-1]))
    merged.weight.copy_(weight.flatten(0, 1).flatten(1).mT * merged.sigma[:, None])
    merged.visible_bias.copy_(mean.flatten())
    merged.hidden_bias.copy_(rbm.hidden_bias.flatten())
    return merged


# Networks


class Softmax(nn.Sequential):
    """Multinomial logistic regression on pixels.

    >>> Softmax(12, 5)(torch.zeros(2, 3, 2, 2)).shape
    torch.Size([2, 5])
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(features, classes)


class FeatureNet(nn.Module):
    """Whitening, the hidden probabilities of a machine, and a logistic regression on them.

    Args:
        features: numbers in an image.
        hidden: units of the machine.
        classes: number of outputs.
        tuned: whether labels train the machine's weights too.

    >>> FeatureNet(12, 8, classes=5, tuned=False)(torch.zeros(2, 3, 2, 2)).shape
    torch.Size([2, 5])
    """

    stages = ("rbm",)

    def __init__(self, features: int, hidden: int, classes: int, tuned: bool) -> None:
        super().__init__()
        self.zca = ZCA(features)
        self.rbm = GaussianBernoulliRBM(features, hidden)
        self.fc = nn.Linear(hidden, classes)
        self.tuned = tuned
        self.rbm.requires_grad_(tuned)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (B, classes), of images (B, C, H, W)."""
        logits: Tensor = self.fc(self.rbm(self.zca(images.flatten(1))))
        return logits


def network(name: str, classes: int, channels: int, size: tuple[int, int]) -> nn.Module:
    """One of the report's networks.

    Args:
        name: ``cifar-softmax``, ``cifar-rbm-N`` or ``cifar-net-N`` with N hidden units.
        classes, channels, size: of the data.

    Raises:
        UserError: there is no such network, or images are too large to be whitened.

    >>> network("cifar-rbm-104", 10, 3, (32, 32)).rbm.weight.shape
    torch.Size([3072, 104])
    """
    features = channels * size[0] * size[1]
    if name == "cifar-softmax":
        return Softmax(features, classes)
    match = re.fullmatch(r"cifar-(rbm|net)-([1-9]\d{0,5})", name)
    if match is None:
        known = ("cifar-softmax", "cifar-rbm-1040", "cifar-net-1040")
        raise UserError(f"there is no network named {name!r}; {did_you_mean(name, known)}")
    if features > MOST:
        raise UserError(
            f"{name} whitens all {features:,} numbers of an image against each other, which goes "
            f"up to {MOST:,}; give a smaller data.size"
        )
    return FeatureNet(features, int(match[2]), classes, tuned=match[1] == "net")


# The report's way to features


class Remembered:
    """What a frozen part of a network says of the training images, made once where that is exact.

    That is so where images are not augmented and all answers fit into memory. They are made in the
    split's own order, so that a resumed run has the same bits.

    Args:
        answer: (B, d), of a batch.
        batches: all training images once, in order.
        width: d.
    """

    def __init__(
        self, answer: Callable[[Batch], Tensor], batches: Callable[[], Iterable[Batch]], width: int
    ) -> None:
        self.answer = answer
        self._batches = batches
        self._width = width
        self._table: Tensor | None = None
        self._place: Tensor | None = None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """The answer to a training batch, (B, d)."""
        view = batch.get("view")
        if view is None or view.of > 1 or 4 * view.samples * self._width > REMEMBERED:
            return self.answer(batch)
        if self._table is None or self._place is None:
            answers, rows = zip(*((self.answer(b), b["row"]) for b in self._batches()), strict=True)
            self._table = torch.cat(answers)
            self._place = torch.zeros(view.rows, dtype=torch.int64)
            self._place[torch.cat(rows).cpu()] = torch.arange(len(self._table))
        return self._table[self._place[batch["row"].cpu()].to(self._table.device)]


class TinyImages(Supervised):
    """Features of images without labels, then a classifier on them, beside its rival.

    Args:
        patch: side of a patch in pixels.
        grid: patches a side.
        dropped: principal components that whitening leaves out, those of least variance.
        eps: added to the variances of the others.
        sigma: deviations of the visible units: ``data``, what whitened pixels deviate by once
            components are dropped, or ``one``.
        steps: N of contrastive divergence.
        noise: sample reconstructed pixels, rather than take their means.
        hidden_bias: that the patches' hidden units start from; below 0 they are seldom on.
        patch_epochs, patch_lr: of the patches' machines.
        merged_epochs, merged_lr: of the merged one.
        batch_size, momentum, weight_decay: of both.
        fine_tune: train the machine's weights by labels too; ``None``: as the network's name says.
    """

    tasks = ("classification",)

    def __init__(
        self,
        patch: Annotated[int, Field(ge=1)] = 8,
        grid: Annotated[int, Field(ge=1, le=64)] = 5,
        dropped: Annotated[int, Field(ge=0)] = 1000,
        eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0,
        sigma: Literal["data", "one"] = "data",
        steps: Annotated[int, Field(ge=1, le=1000)] = 1,
        noise: bool = True,
        hidden_bias: Annotated[float, Field(allow_inf_nan=False)] = 0.0,
        patch_epochs: Whole = 50,
        patch_lr: Positive = 0.05,
        merged_epochs: Whole = 20,
        merged_lr: Positive = 0.001,
        batch_size: Annotated[int, Field(ge=1, le=10**6)] = 128,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2e-4,
        fine_tune: bool | None = None,
    ) -> None:
        super().__init__()
        self.patch, self.grid = patch, grid
        self.dropped, self.eps = dropped, eps
        self.sigma = sigma
        self.steps, self.noise = steps, noise
        self.hidden_bias = hidden_bias
        self.fine_tune = fine_tune
        shared = Training(
            batch_size=batch_size, momentum=momentum, weight_decay=weight_decay, decay="kernels"
        )
        self.patch_training, self.merged_training = (
            shared.model_copy(update={"epochs": epochs, "lr": lr})
            for epochs, lr in ((patch_epochs, patch_lr), (merged_epochs, merged_lr))
        )
        self._banks: dict[int, PatchRBM] = {}
        self._layout: Layout | None = None

    def rehearse(self, bench: Bench) -> None:
        network = bench.make_student(bench.seeds[0])
        model = _features_of(network)
        layout = self._laid_out(bench, network)
        hidden, machines = model.rbm.weight.shape[1], layout.machines
        if hidden % machines:
            fewer, name = hidden // machines * machines, network.name.rpartition("-")[0]
            near = f"{name}-{fewer} or {name}-{fewer + machines}"
            raise UserError(
                f"{network.name}: {machines} machines cannot have {hidden:,} hidden units in equal "
                f"parts; take {near if fewer else f'{name}-{machines}'}, or another grid"
            )
        d = len(model.zca.mean)
        if self.dropped >= d:
            raise UserError(
                f"TinyImages(dropped={self.dropped}): an image has {d:,} components, of which "
                f"0 to {d - 1:,} can be dropped"
            )
        super().rehearse(bench)

    def phases(self, bench: Bench) -> Phases:
        # Whitening depends on the images alone, so all seeds share it.
        reader = bench.laid_out(bench.make_student(bench.seeds[0]))
        zca = _features_of(reader).zca
        self._layout = layout = self._laid_out(bench, reader)

        def whiten(_: Journal) -> dict[str, float]:
            batches = bench.task.batches(bench.transfer, batch_size=1024).epoch(0)
            zca.fit((_fed(reader, b) for b in batches), self.dropped, self.eps)
            return {"lost": zca.lost}

        found = yield Solve(name="whiten", run=whiten, writes={"zca": zca})
        bench.voice.say(
            f"whiten: {zca.kept:,} of {len(zca.mean):,} components kept; those dropped hold "
            f"{found['lost']:.2%} of the variance"
        )
        whitened = _remembered(bench, lambda batch: zca(_fed(reader, batch)), len(zca.mean))
        for seed in bench.seeds:
            yield from bench.plain(seed)
            yield from self._learn(bench, seed, zca, layout, whitened)

    def _learn(
        self, bench: Bench, seed: int, zca: ZCA, layout: Layout, whitened: Remembered
    ) -> Phases:
        """Patches, the merged machine, the classifier."""
        student = bench.student(seed)
        model = _features_of(student)
        model.zca.load_state_dict(zca.state_dict())
        deviations = layout.deviations(zca) if self.sigma == "data" else torch.ones(())
        with torch.random.fork_rng():
            torch.manual_seed(derive(seed, 0) >> 1)
            hidden = model.rbm.weight.shape[1] // layout.machines
            bank = self._banks[seed] = PatchRBM(layout, hidden).to(bench.device)
        bank.rbm.set_sigma(deviations)
        nn.init.constant_(bank.rbm.hidden_bias, self.hidden_bias)

        yield self._divergence(
            bench, "patches", seed, self.patch_training, bank.rbm, whitened, layout.cut
        )

        def merge(_: Journal) -> None:
            # All squares have one deviation, which is the whole image's.
            merged = merge_patch_rbms(bank, float(bank.rbm.sigma[0, 0]))
            model.rbm.load_state_dict(merged.state_dict())

        yield Solve(name=bench.label("merge", seed), run=merge, writes={"rbm": model.rbm})
        model.rbm.requires_grad_(True)
        yield self._divergence(
            bench, "merged", seed, self.merged_training, model.rbm, whitened, _as_it_is
        )
        tuned = model.tuned if self.fine_tune is None else self.fine_tune
        model.rbm.requires_grad_(tuned)
        fit = bench.fit(bench.label("student", seed), student, bench.training, seed=seed)
        if not tuned:
            fit.updates = [replace(fit.updates[0], terms=_on_features(bench, model, whitened))]
        yield fit

    def _divergence(
        self,
        bench: Bench,
        name: str,
        seed: int,
        training: Training,
        rbm: GaussianBernoulliRBM,
        whitened: Remembered,
        cut: Callable[[Tensor], Tensor],
    ) -> Fit:
        """Contrastive divergence over the images, as a student's phase before it sees labels."""
        split = bench.validation if len(bench.validation) else bench.transfer
        watched: list[Tensor] = []

        def terms(batch: Batch) -> Terms:
            v = cut(whitened(batch))
            return {"divergence": contrastive_divergence(rbm, v, self.steps, self.noise)}

        @torch.no_grad()
        def measure() -> dict[str, float]:
            if not watched:
                batches = bench.task.batches(split, batch_size=WATCHED).epoch(0)
                watched.append(cut(whitened.answer(next(batches))))
            return {"reconstruction error": reconstruction_error(rbm, watched[0])}

        return Fit(
            name=bench.label(name, seed),
            seed=seed,
            updates=[Update(train={"rbm": rbm}, terms=terms, settings=training, name="rbm")],
            batches=bench.batches(training.batch_size, seed),
            epochs=training.epochs,
            evaluate=measure,
            higher_is_better=False,
        )

    def _laid_out(self, bench: Bench, network: Network) -> Layout:
        """The patches of what the network is fed."""
        fed = bench.sample()["image"].cpu()
        fed = fed if network.input is None else network.input(fed)
        _, channels, height, width = fed.shape
        return Layout(channels, (height, width), self.patch, self.grid)

    def findings(self, bench: Bench, metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
        seed, layout = bench.seeds[0], self._layout
        assert layout is not None, "findings follow the phases"
        model = _features_of(bench.students[seed])
        return [
            _whitening(model.zca, layout),
            _filters(self._banks[seed], model, layout),
            _errors(metrics, [bench.label(name, seed) for name in ("patches", "merged")]),
        ]


@torch.no_grad()
def reconstruction_error(rbm: BernoulliRBM, v: Tensor) -> float:
    """Squared error of reconstructing v from its hidden probabilities, as a share of v's squares.

    >>> reconstruction_error(GaussianBernoulliRBM(2, 3), torch.ones(4, 2)) > 0.5
    True
    """
    return float((rbm.reconstruct(v) - v).square().sum() / v.square().sum())


def _as_it_is(images: Tensor) -> Tensor:
    return images


def _remembered(bench: Bench, answer: Callable[[Batch], Tensor], width: int) -> Remembered:
    def batches() -> Iterable[Batch]:
        return bench.task.batches(bench.transfer, batch_size=1024).epoch(0)

    return Remembered(answer, batches, width)


def _on_features(bench: Bench, model: FeatureNet, whitened: Remembered) -> Callable[[Batch], Terms]:
    """The supervised loss of the last layer alone; what is below it does not change."""

    def answer(batch: Batch) -> Tensor:
        hidden: Tensor = model.rbm(whitened.answer(batch))
        return hidden

    features = _remembered(bench, answer, model.rbm.weight.shape[1])

    def terms(batch: Batch) -> Terms:
        answer = Answer({"logits": model.fc(features(batch))})
        return {"labels": bench.task.loss(answer, batch)}

    return terms


def _fed(network: Network, batch: Batch) -> Tensor:
    """What a network's model sees of a batch, flat: (B, d)."""
    view = batch["image"].to(next(network.model.buffers()).device)
    fed: Tensor = view if network.input is None else network.input(view)
    return fed.flatten(1)


def _features_of(network: Network) -> FeatureNet:
    if not isinstance(network.model, FeatureNet):
        name = network.name or type(network.model).__name__
        raise UserError(
            f"TinyImages learns the features of cifar-rbm-N or cifar-net-N and cannot fill {name}"
        )
    return network.model


# What the report shows


def filter_grid(filters: Tensor, columns: int = 8, zoom: int = 1) -> Tensor:
    """Filters as one picture, each on its own scale, grey being zero.

    Args:
        filters: (N, C, h, w), C being 1 or 3.
        columns: filters a row.
        zoom: pixels a side that one number is shown as.

    Returns:
        uint8, (H, W) or (H, W, 3), with white lines of a pixel between the filters.

    >>> filter_grid(torch.tensor([-1.0, 0.0, 0.5, 1.0]).view(1, 1, 2, 2)).tolist()
    [[1, 128], [192, 255]]
    """
    number, channels, height, width = filters.shape
    most = filters.abs().flatten(1).amax(1).clamp(min=1e-12)
    scaled = (filters / most[:, None, None, None] * 127 + 128).round().to(torch.uint8)
    scaled = scaled.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    columns = min(columns, number)
    rows = -(-number // columns)
    framed = F.pad(scaled, (0, 1, 0, 1), value=255)
    height, width = framed.shape[2:]
    canvas = framed.new_full((rows * columns, channels, height, width), 255)
    canvas[:number] = framed
    picture = canvas.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    picture = picture.reshape(rows * height, columns * width, channels)[:-1, :-1]
    return picture.squeeze(2) if channels == 1 else picture


def _zoom(side: int) -> int:
    """So that a filter is some fifty pixels wide."""
    return max(1, round(48 / side))


def _whitening(zca: ZCA, layout: Layout) -> Finding:
    shape = (layout.channels, *layout.size)
    d, kept = len(zca.mean), zca.kept
    pixels = layout.size[0] * layout.size[1]
    middle = pixels // 2 + layout.size[1] // 2
    near = [middle, *torch.linspace(0, pixels - 1, 7).long().tolist()]
    rows = [channel * pixels + place for channel in range(layout.channels) for place in near]
    wanted = torch.zeros(len(rows), d, device=zca.mean.device)
    wanted[torch.arange(len(rows)), torch.tensor(rows)] = 1
    with torch.no_grad():
        filters, back = zca._scaled(wanted, -0.5), zca._scaled(wanted, 0.5)
    grids = {
        "whitening filters": filter_grid(filters.view(-1, *shape), 8, _zoom(layout.size[1])),
        "the filters of its inverse": filter_grid(back.view(-1, *shape), 8, _zoom(layout.size[1])),
    }
    variances = zca.variances.clamp(min=1e-12).log10().tolist()
    line = list(enumerate(variances, start=1))[:: max(1, d // 300)]
    table = [
        ["components", "kept", "dropped", "variance in those dropped", "least variance kept"],
        [
            f"{d:,}",
            f"{kept:,}",
            f"{d - kept:,}",
            f"{zca.lost:.3%}",
            f"{float(zca.variances[kept - 1]):.3g}",
        ],
    ]
    return Finding(
        "Whitening",
        "Each picture shows what one pixel of a whitened image is made of, a row for each colour: "
        "the pixel in the middle, then from the top left to the bottom right. Above, how much "
        "variance the principal components have.",
        table=table,
        charts=[
            Chart("Principal components", "component", "log10 of variance", {"variance": line})
        ],
        pictures={name: grid.cpu() for name, grid in grids.items()},
    )


def _filters(bank: PatchRBM, model: FeatureNet, layout: Layout) -> Finding:
    shape = (layout.channels, layout.patch, layout.patch)
    patches = bank.rbm.weight.detach().mT.unflatten(-1, shape)  # (K, n, C, p, p)
    centre = layout.grid**2 // 2
    merged = model.rbm.weight.detach().mT.unflatten(-1, (layout.channels, *layout.size))
    spread = torch.linspace(0, len(merged) - 1, min(64, len(merged))).long()
    grids = {
        "units of the patch in the middle": filter_grid(
            patches[centre, :64], 8, _zoom(layout.patch)
        ),
        "units of the small whole image": filter_grid(patches[-1, :64], 8, _zoom(layout.patch)),
        "units of the merged machine": filter_grid(merged[spread], 8, _zoom(layout.size[1])),
    }
    return Finding(
        "Filters",
        "What hidden units look for in a whitened image, each on its own scale: grey is zero. The "
        "merged machine's are shown over the whole image, as they are in the finished network.",
        pictures={name: grid.cpu() for name, grid in grids.items()},
    )


def _errors(metrics: Sequence[Mapping[str, Any]], phases: Sequence[str]) -> Finding:
    lines = {
        phase: [
            (float(line["epoch"]), float(line["validation"]["reconstruction error"]))
            for line in metrics
            if line.get("phase") == phase and "reconstruction error" in line.get("validation", {})
        ]
        for phase in phases
    }
    chart = Chart(
        "Reconstruction", "epoch", "error", {name: line for name, line in lines.items() if line}
    )
    return Finding(
        "Reconstruction",
        "Squared error of whitened images, or of their patches, that are reconstructed from hidden "
        "probabilities, as a share of their squares. Contrastive divergence does not minimise it.",
        charts=[chart],
    )
