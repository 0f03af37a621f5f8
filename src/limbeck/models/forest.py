"""A random forest as a module: fitted by scikit-learn, stored and answering as tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.training.network import Solved

LEAST = 1e-6
"""The probability below which none is told, as its logarithm has to be finite."""


class Forest(Solved):
    """Trees whose mean is a distribution over the classes: (B, D) -> its logarithm, (B, C).

    Fitted to labels the trees are scikit-learn's random forest of classifiers (Breiman: Random
    Forests, 2001), to probabilities its forest of regressors, whose mean is a distribution too.
    All trees lie in arrays of one size, so that a forest is weights like any other; a split's
    threshold is rounded down to float32, which decides every float32 as before.

    Args:
        inputs: numbers in one sample, D.
        trees: how many.
        leaves: the most that a tree has; grown best first where it would have more.
        classes: C.

    Example:
        >>> forest = Forest(inputs=1, trees=3, leaves=2, classes=2)
        >>> forest(torch.zeros(1, 1)).exp()
        tensor([[0.5000, 0.5000]])
        >>> forest.solve(torch.tensor([[0.0], [0.0], [1.0], [1.0]]), torch.tensor([0, 0, 1, 1]), 0)
        >>> forest(torch.tensor([[-1.0], [2.0]])).argmax(1)
        tensor([0, 1])
    """

    feature: Tensor
    left: Tensor
    right: Tensor
    depth: Tensor

    def __init__(self, inputs: int, trees: int, leaves: int, classes: int) -> None:
        super().__init__()
        self.inputs, self.trees, self.leaves, self.classes = inputs, trees, leaves, classes
        nodes = 2 * leaves - 1
        # Parameters, as they are what it has learned and what its size is told by.
        value = torch.full((trees, nodes, classes), 1 / classes)
        self.threshold = nn.Parameter(torch.zeros(trees, nodes), requires_grad=False)
        self.value = nn.Parameter(value, requires_grad=False)
        # A leaf is its own child, so that all samples may take the same number of steps.
        self.register_buffer("feature", torch.zeros(trees, nodes, dtype=torch.int64))
        self.register_buffer("left", torch.arange(nodes).repeat(trees, 1))
        self.register_buffer("right", torch.arange(nodes).repeat(trees, 1))
        self.register_buffer("depth", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(_check_places)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        tree = torch.arange(self.trees, device=x.device)
        node = torch.zeros(len(x), self.trees, dtype=torch.int64, device=x.device)
        for _ in range(min(int(self.depth), self.leaves)):
            beyond = x.gather(1, self.feature[tree, node]) > self.threshold[tree, node]
            node = torch.where(beyond, self.right[tree, node], self.left[tree, node])
        return self.value[tree, node].mean(1).clamp(min=LEAST).log()

    @torch.no_grad()
    def solve(self, inputs: Tensor, targets: Tensor, seed: int) -> None:
        from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

        kind: Any = RandomForestRegressor if targets.is_floating_point() else RandomForestClassifier
        forest = kind(
            n_estimators=self.trees,
            max_leaf_nodes=self.leaves,
            random_state=seed,
            n_jobs=torch.get_num_threads(),
        )
        forest.fit(inputs.float().cpu().numpy(), targets.cpu().numpy())
        known = getattr(forest, "classes_", range(self.classes))
        blank = Forest(self.inputs, self.trees, self.leaves, self.classes)
        blank.value.zero_()
        for number, estimator in enumerate(forest.estimators_):
            blank.plant(number, estimator.tree_, torch.as_tensor(list(known)))
        blank.depth.fill_(max(e.tree_.max_depth for e in forest.estimators_))
        self.load_state_dict(blank.state_dict())

    def plant(self, number: int, tree: Any, classes: Tensor) -> None:
        """Put scikit-learn's arrays of a tree, whose columns are these classes, in its place."""
        own = torch.arange(tree.node_count)
        left, right, feature = (
            torch.from_numpy(array.copy()).long()
            for array in (tree.children_left, tree.children_right, tree.feature)
        )
        leaf = left < 0
        self.left[number, own] = torch.where(leaf, own, left)
        self.right[number, own] = torch.where(leaf, own, right)
        self.feature[number, own] = feature.clamp(min=0)
        exact = torch.from_numpy(tree.threshold.copy())
        rounded = exact.float()
        below = torch.nextafter(rounded, torch.tensor(-torch.inf))
        self.threshold[number, own] = torch.where(rounded.double() > exact, below, rounded)
        value = torch.from_numpy(tree.value.copy()).reshape(tree.node_count, len(classes))
        self.value[number, own[:, None], classes] = (value / value.sum(1, keepdim=True)).float()


def _check_places(forest: nn.Module, _: Any) -> None:
    """Refuse stored trees that lead out of their arrays."""
    assert isinstance(forest, Forest), "the hook is a forest's own"
    ends = {"feature": forest.inputs, "left": 2 * forest.leaves - 1, "right": 2 * forest.leaves - 1}
    for name, end in ends.items():
        places = getattr(forest, name)
        if not bool(((places >= 0) & (places < end)).all()):
            raise ValueError(f"{name} holds places beyond the {end:,} that there are")
