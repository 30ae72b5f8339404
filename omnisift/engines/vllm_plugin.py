"""Tell vLLM of the model that reads kept tokens: the entry point `vllm.general_plugins`.

vLLM calls `register` in each of its processes. Nothing of vLLM is patched.
"""

ARCHITECTURE = "OmniSiftThinker"
MODALITY = "kept_tokens"


def register() -> None:
    """Name the model's class; it is imported when an engine asks for it."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "omnisift.engines.vllm_model:OmniSiftThinker")
