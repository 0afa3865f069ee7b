"""Log lines of this pack as ComfyUI's log can take them: what it cannot write, it raises for in whoever logs."""

from __future__ import annotations

import copy
import logging

from ..reading.names import encodable
from .errors import told


class Told(logging.Handler):
    """Hands every record of the pack on to the root's handlers, as one line that any stream can write."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            told_record = copy.copy(record)
            told_record.msg, told_record.args = told(record.getMessage()), None
            if record.exc_info:
                told_record.exc_text = encodable(logging.Formatter().formatException(record.exc_info))
        except Exception:  # noqa: BLE001 (as every handler of Python's does)
            self.handleError(record)
            return
        logging.getLogger().callHandlers(told_record)


def tell(package: str) -> None:
    """Puts `Told` between the loggers below ``package`` and ComfyUI's. A filter would not see those of modules."""
    log = logging.getLogger(package)
    if not any(isinstance(h, Told) for h in log.handlers):
        log.addHandler(Told())
        log.propagate = False
