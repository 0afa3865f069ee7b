"""What can become of a key of a LoRA file: the words of every report, and the refusal that carries one of them."""

from __future__ import annotations

# status -> what a report calls it, in this order
STATUSES = {
    "model": "applied to the model",
    "text": "applied to the text encoder",
    "other part": "for a part that is not connected",
    "unknown": "unknown to this model",
    "shape": "of another shape than the layer",
    "rows": "of a kind that cannot be cut into rows",
    "dropped": "for a weight that ComfyUI does not patch",
    "unread": "of a kind that is not read",
    "incomplete": "without the other half",
    "halves": "of factors that do not fit each other",
    "empty": "empty, adding nothing",
    "broken": "with NaN or infinity",
    "setting": "for a setting of newer ComfyUI, left out",
}
APPLIED = ("model", "text")


class Refused(ValueError):
    """An update that is not applied. ``status``: one of `STATUSES`; ``why``: what a report adds to its words."""

    def __init__(self, status: str, why: str = ""):
        super().__init__(f"{STATUSES[status]}: {why}" if why else STATUSES[status])
        self.status, self.why = status, why
