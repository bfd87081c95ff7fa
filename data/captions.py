"""What is done to a caption before the tokenizer sees it."""

from collections.abc import Callable

CLEANING = "lower-strip"


def lower_strip(caption: str) -> str:
    """Lower case without white space around, as diffusers' IFPipeline treats a prompt when clean_caption is off."""
    return caption.lower().strip()


CLEANINGS: dict[str, Callable[[str], str]] = {"lower-strip": lower_strip}


def cleaner(name: str) -> Callable[[str], str]:
    """The cleaning of that name.

    Raises: ValueError if there is none.
    """
    if name not in CLEANINGS:
        raise ValueError(f"cleaning={name} must be one of {', '.join(CLEANINGS)}; this version knows no other")
    return CLEANINGS[name]
