"""`blipfast doctor`: what this machine and installation can do."""

from __future__ import annotations

import argparse
from typing import Any

from .common import add_verb

EXAMPLES = """example:
  blipfast doctor
"""


def add(verbs: Any) -> None:
    add_verb(verbs, "doctor", doctor, "show what this machine and installation can do", EXAMPLES)


def doctor(args: argparse.Namespace) -> int:
    """Print what is installed."""
    from blipfast.doctor import report

    print(report())
    return 0
