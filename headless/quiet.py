"""What libraries say stays off the terminal: warnings, their logs, their progress bars. Only the command line's own is
shown. A person who sets PYTHONWARNINGS, or a library's own variable such as DIFFUSERS_VERBOSITY, hears it all again.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# logger of a library -> the variable that it reads its level from as it is imported
LEVELS = {"diffusers": "DIFFUSERS_VERBOSITY", "transformers": "TRANSFORMERS_VERBOSITY", "huggingface_hub":
          "HF_HUB_VERBOSITY", "peft": "", "torch": "TORCH_CPP_LOG_LEVEL"}  # fmt: skip
SWITCHES = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
LOUDEST = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # the others know "critical"


def libraries() -> None:
    """Silences those that are imported, and those that are going to be. What is an error is raised, too."""
    for variable, value in SWITCHES.items():
        os.environ.setdefault(variable, value)
    for name, variable in LEVELS.items():
        quiet = LOUDEST.get(variable, "critical")
        if variable and os.environ.setdefault(variable, quiet) != quiet:
            continue
        logging.getLogger(name).setLevel(logging.CRITICAL)
        own = sys.modules.get(f"{name}.utils.logging")
        if own is not None and hasattr(own, "disable_progress_bar"):
            own.set_verbosity(logging.CRITICAL)
            own.disable_progress_bar()
    hub = sys.modules.get("huggingface_hub.utils")
    if hub is not None:
        hub.disable_progress_bars()


@contextmanager
def quiet() -> Iterator[None]:
    """For as long as a command runs."""
    libraries()
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield
