"""Ensemble distillation for robust model fusion in federated learning. Lin, Kong, Stich, Jaggi,
NeurIPS 2020 (arXiv 2006.07242).

Clients train on private data; a server that averages their weights suffers where their data differ,
and cannot average networks of different architectures at all. FedDF takes the average only as a
start: the server distils what all received clients say together about unlabelled images into it.
Only logits cross between architectures, so several families of networks learn from one another.

``fusion`` holds the paper: the losses, the averages and the method. ``clients`` holds the split,
the local training and how orders are carried; ``flower`` lets Flower carry them.
"""

from limbeck.systems.federated.feddf.clients import dirichlet_partition, proximal, sampled
from limbeck.systems.federated.feddf.fusion import (
    FedDF,
    average,
    drop_worst,
    feddf,
    server_momentum,
)

__all__ = [
    "FedDF",
    "average",
    "dirichlet_partition",
    "drop_worst",
    "feddf",
    "proximal",
    "sampled",
    "server_momentum",
]
