"""What pictures of one kind have in common, and what they are in training for.

Prior preservation is DreamBooth's (arXiv 2208.12242, section 3.3): the loss is that of the style's pictures plus a
weight times that of others, which keep the model from forgetting what they show. The others' target is either what
their pictures say ("pictures"), or what the model without the adapter predicts from the same noise ("base": knowledge
distillation, which asks nothing of the pictures and is zero, with its gradient, before the first step).
"""

from dataclasses import dataclass

STYLE, PICTURES, BASE = "style", "pictures", "base"
PRIORS = (PICTURES, BASE)
PRIOR_WEIGHT = 1.0  # of their loss
PRIOR_SHARE = 0.5  # of the samples, where there are pictures for prior preservation: DreamBooth's


@dataclass(frozen=True)
class Concept:
    """What is said of several pictures at once. ValueError for a value that means nothing."""

    style_phrase: str | None = None  # None = the one of the run
    caption_mode: str | None = None  # a key of CAPTION_MODES; None = the one of the run
    resolutions: tuple[int, ...] = ()  # pixels: every picture is trained at each of them. () = the run's
    orders: int = 1  # in how many orders a caption's tags are trained, the written one among them
    keep: int = 0  # tags that stay in front
    weight: float = 1.0  # factor on the loss of these pictures
    role: str = STYLE  # or one of PRIORS

    def __post_init__(self) -> None:
        if self.role not in (STYLE, *PRIORS):
            raise ValueError(f"Unknown role {self.role!r}: expected one of {', '.join((STYLE, *PRIORS))}")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"The weight of pictures is {self.weight}, expected a positive number, such as 1")
        if self.orders < 1 or self.keep < 0:
            raise ValueError(f"Got {self.orders} orders of tags and {self.keep} to keep: expected 1 and 0 or more")


def unused_prior(weight: float, share: float) -> str:
    """What a person should know who set these where nothing is there to preserve with; "" = they are as ever."""
    changed = {"prior_weight": (weight, PRIOR_WEIGHT), "prior_share": (share, PRIOR_SHARE)}
    names = [f"{name} = {value:g}" for name, (value, usual) in changed.items() if value != usual]
    if not names:
        return ""
    return (
        f"{' and '.join(names)} change{'' if len(names) > 1 else 's'} nothing, for there is no regularisation: give "
        "regularisation pictures, or let prior_target be the base model, which asks for none"
    )


def check_prior_share(share: float) -> None:
    """ValueError for a share of samples that leaves one side nothing."""
    if not 0.01 <= share <= 0.99:
        raise ValueError(f"The share of samples for prior preservation is {share}, expected 0.01 to 0.99")
