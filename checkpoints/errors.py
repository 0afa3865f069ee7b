"""One kind of error for every bad file: a sentence that says what is wrong, where, and what to do."""


class CheckpointError(ValueError):
    """``what`` is wrong in ``file`` (and ``layer``); ``remedy`` is what the reader can do about it."""

    def __init__(self, file: str, what: str, remedy: str, layer: str = ""):
        where = f"{file}, layer {layer}" if layer else file
        super().__init__(f"{where}: {what}. {remedy}")
        self.file, self.layer = file, layer
