"""What ``limbeck.models`` shows, and at what cost."""

from __future__ import annotations

import subprocess
import sys

import pytest


def in_a_fresh_process(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_names_and_their_mistakes_are_known_without_torch() -> None:
    code = (
        "import sys; from limbeck.models import weights_given; "
        "from limbeck.models.zoo import NAMES; weights_given('timm:x@pretrained'); "
        "print('torch' in sys.modules, 'resnet20' in NAMES)"
    )
    assert in_a_fresh_process(code) == "False True"


def test_importing_the_modules_of_the_same_names_leaves_the_functions_in_place() -> None:
    code = (
        "import limbeck.models.build, limbeck.models.profile\n"
        "from limbeck.models import Input, Network, build, profile\n"
        "print(build.__name__, profile.__name__, Input.__name__, Network.__name__)"
    )
    assert in_a_fresh_process(code) == "build profile Input Network"


def test_an_unknown_name_is_an_attribute_error() -> None:
    import limbeck.models

    with pytest.raises(AttributeError, match="nothing"):
        limbeck.models.nothing  # noqa: B018
