"""Which tensors of a checkpoint are the LLM's, and what vLLM calls them."""

import re

# "thinker." stands in a published checkpoint and not in one of a thinker alone; transformers
# moved the LLM one module down between 5.17 and 5.23.
_LANGUAGE_MODEL = re.compile(
    r"^(?:thinker\.)?(?:model\.(?:language_model\.)?(?P<model>(?:layers|embed_tokens|norm)\..+)"
    r"|(?P<head>lm_head\..+))$"
)


def language_model_name(name: str) -> str | None:
    """Return vLLM's name of a checkpoint's tensor; None: it is of the towers or the speech half."""
    found = _LANGUAGE_MODEL.match(name)
    if found is None:
        return None
    return "language_model." + (found["head"] or f"model.{found['model']}")
