"""Model Compression with Generative Adversarial Networks. Liu, Fusi, Mackey, 2018 (arXiv
1812.02271), later called Teacher-Student Compression with Generative Adversarial Networks.

What a teacher says of the samples that it was trained on is over-confident, and they cover the
input space thinly. So a generator of samples of wanted classes is trained on them against a judge,
the *teacher* says what it thinks of what the generator makes, and the student learns that beside
what the teacher says of real samples. How well a student learns from a set that it sees once is the
set's compression score.

Needs: rows of tables or images with a class each; teachers may be forests, and so may students of
rows. ``losses`` has the equations, ``networks`` the generators, ``method`` the training.
"""

from limbeck.systems.generative.gan_mc.losses import (
    balanced,
    compression,
    compression_score,
    generator_terms,
    judge_terms,
    munge,
)
from limbeck.systems.generative.gan_mc.method import GANMC, Mixed
from limbeck.systems.generative.gan_mc.networks import (
    Generator,
    ImageGenerator,
    Judge,
    LeNet,
    NetworkInNetwork,
    RowGenerator,
    network,
)

__all__ = [
    "GANMC",
    "Generator",
    "ImageGenerator",
    "Judge",
    "LeNet",
    "Mixed",
    "NetworkInNetwork",
    "RowGenerator",
    "balanced",
    "compression",
    "compression_score",
    "generator_terms",
    "judge_terms",
    "munge",
    "network",
]
