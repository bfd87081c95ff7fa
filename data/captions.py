"""What is done to a caption before the tokenizer sees it."""

CLEANING = "lower-strip"


def clean(caption: str) -> str:
    """Lower case without white space around, as diffusers' IFPipeline treats a prompt when clean_caption is off."""
    return caption.lower().strip()
