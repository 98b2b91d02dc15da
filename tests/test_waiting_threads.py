"""How the threads of a reconstruction wait: briefly, unless the user has said how."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os
import quantitron.gadgets
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("said", "then"),
    [
        ({}, "PASSIVE 1000"),
        ({"GOMP_SPINCOUNT": "50"}, "PASSIVE 50"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "PASSIVE None"),
    ],
)
def test_what_the_user_says_about_waiting_holds(said: dict[str, str], then: str) -> None:
    bare = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=bare | said,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == then
