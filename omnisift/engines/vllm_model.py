"""The LLM of Qwen2.5-Omni in vLLM, reading kept tokens at their true positions.

vLLM's own Qwen2.5-Omni lays out whole videos by formula, and its prompt embeddings are placed as
plain text. Here one placeholder of the prompt stands for the kept tokens of a video, which bring
their positions along. This module imports vLLM: only vLLM itself loads it (see vllm_plugin).

Shapes: n kept tokens, D width, L tokens of a prompt.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.feature_extraction_utils import BatchFeature
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import (
    SupportsMRoPE,
    SupportsMultiModal,
    SupportsPP,
)
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ModalityDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)
from vllm.multimodal.processing.inputs import ProcessorInputs

from omnisift.engines.vllm_plugin import MODALITY
from omnisift.engines.vllm_weights import language_model_name
from omnisift.prompts import prompt_positions

# Longest videos that are at hand at a time. vLLM plans a step while the one before is running,
# whose videos it still holds: with room for one, every other step would have no video to read.
_ROOM = 4
_FIELDS = ("kept_embeds", "kept_positions", "kept_next_position")


def _thinker(hf_config: Any) -> Any:
    return getattr(hf_config, "thinker_config", hf_config)


class KeptItems(ModalityDataItems[list[dict[str, Tensor]], dict[str, Tensor]]):
    """Videos of one prompt: each {kept_embeds [n, D], kept_positions [3, n], ..._next_position}."""

    def get_count(self) -> int:
        """Return how many there are."""
        return len(self.data)

    def get(self, index: int) -> dict[str, Tensor]:
        """Return one of them."""
        item: dict[str, Tensor] = self.data[index]
        return item

    def get_processor_data(self) -> Mapping[str, object]:
        """Return nothing: there is no processor of transformers to call."""
        return {}

    def get_passthrough_data(self) -> Mapping[str, object]:
        """Return nothing: what passes through is sent again with every question."""
        return {}


class KeptParser(MultiModalDataParser):
    """Take the items as they are; `omnisift.engines.vllm_engine` has checked them."""

    def _get_subparsers(self) -> Mapping[str, Any]:
        return {MODALITY: lambda items: KeptItems(list(items), MODALITY)}


class KeptInfo(BaseProcessingInfo):
    """One video a prompt, as long as the prompt at most."""

    def get_data_parser(self) -> KeptParser:
        """Return the parser of kept tokens."""
        return KeptParser()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Return the number of videos a prompt may have."""
        return {MODALITY: 1}

    def get_mm_max_tokens_per_item(
        self,
        seq_len: int,
        mm_counts: Mapping[str, int] | None = None,  # noqa: ARG002 (vLLM's signature)
    ) -> Mapping[str, int]:
        """Return for how many tokens vLLM has room before they are read: of several videos."""
        return {MODALITY: _ROOM * seq_len}


class KeptDummyInputs(BaseDummyInputsBuilder[KeptInfo]):
    """What vLLM measures its memory with: one of the longest videos."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:  # noqa: ARG002
        """Return no text: the prompt is ids."""
        return ""

    def get_dummy_processor_inputs(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> ProcessorInputs:
        """Return a prompt of ids with its videos."""
        items = self.get_dummy_mm_data(seq_len, mm_counts, mm_options)[MODALITY]
        placeholder = _thinker(self.info.get_hf_config()).video_token_id
        data = self.info.parse_mm_data({MODALITY: items}, validate=False)
        return ProcessorInputs(prompt=[placeholder] * len(items), mm_data_items=data)

    def get_dummy_mm_data(
        self,
        seq_len: int,
        mm_counts: Mapping[str, int],
        mm_options: Mapping[str, Any],  # noqa: ARG002
    ) -> dict[str, Any]:
        """Return videos that fill a whole prompt."""
        config = _thinker(self.info.get_hf_config()).text_config
        positions = torch.arange(seq_len).expand(3, -1)
        embeds = torch.zeros(seq_len, config.hidden_size, dtype=self.info.ctx.model_config.dtype)
        item = dict(zip(_FIELDS, (embeds, positions, torch.tensor(seq_len)), strict=True))
        return {MODALITY: [item] * mm_counts.get(MODALITY, 0)}


class KeptProcessor(BaseMultiModalProcessor[KeptInfo]):
    """Expand the placeholder of a prompt to as many tokens as the video has."""

    def get_dummy_inputs(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> ProcessorInputs:
        """Return what vLLM measures its memory with; up to 0.26 it asks the builder itself."""
        return self.dummy_inputs.get_dummy_processor_inputs(seq_len, mm_counts, mm_options)

    def _apply_hf_processor_main(self, *_: Any, **given: Any) -> Any:
        # vLLM <= 0.26 passes the prompt along and wants it back, and to hear whether the
        # placeholder has been expanded already; later versions ask for the items alone.
        items = given["mm_items"].get(MODALITY, ())
        data = {name: [item[name] for item in items] for name in _FIELDS} if len(items) else {}
        features = BatchFeature(data)
        if "prompt" not in given:
            return features
        return given["prompt"], features, False

    def _get_mm_fields_config(
        self,
        hf_inputs: BatchFeature,  # noqa: ARG002
        hf_processor_mm_kwargs: Mapping[str, object],  # noqa: ARG002
    ) -> Mapping[str, MultiModalFieldConfig]:
        embeds, *places = _FIELDS
        return {
            embeds: MultiModalFieldConfig.batched(MODALITY),
            **{name: MultiModalFieldConfig.batched(MODALITY, keep_on_cpu=True) for name in places},
        }

    def _get_prompt_updates(
        self,
        mm_items: Any,  # noqa: ARG002
        hf_processor_mm_kwargs: Mapping[str, object],  # noqa: ARG002
        out_mm_kwargs: Any,
    ) -> Sequence[PromptReplacement]:
        placeholder = _thinker(self.info.get_hf_config()).video_token_id

        def expanded(index: int) -> list[int]:
            return [placeholder] * len(out_mm_kwargs[MODALITY][index]["kept_embeds"].data)

        return [PromptReplacement(modality=MODALITY, target=[placeholder], replacement=expanded)]


@MULTIMODAL_REGISTRY.register_processor(KeptProcessor, info=KeptInfo, dummy_inputs=KeptDummyInputs)
class OmniSiftThinker(nn.Module, SupportsMultiModal, SupportsPP, SupportsMRoPE):
    """vLLM's Qwen2 behind kept tokens. The towers of the checkpoint are left out."""

    language_model: Any
    make_empty_intermediate_tensors: Any
    packed_modules_mapping = {  # noqa: RUF012 (vLLM's name; quantised weights are found by it)
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = _thinker(vllm_config.model_config.hf_config)
        # transformers ties by the outer configuration; the inner one's default says the opposite.
        text_config = self.config.text_config
        text_config.tie_word_embeddings = self.config.tie_word_embeddings
        mark: Any = self._mark_language_model  # a method, which mypy takes for a submodule
        with mark(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                prefix=maybe_prefix(prefix, "language_model"),
                hf_config=text_config,
                architectures=["Qwen2ForCausalLM"],
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:  # noqa: ARG003
        """Return nothing: prompts are ids, not text."""
        return None

    def embed_multimodal(self, **fields: Any) -> list[Tensor]:
        """Return the kept tokens [n, D] of each video."""
        dtype = self.language_model.model.embed_tokens.weight.dtype
        embeds: Sequence[Tensor] = fields["kept_embeds"]
        return [tokens.to(dtype) for tokens in embeds]

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: Sequence[Any]
    ) -> tuple[Tensor, int]:
        """Return the positions [3, L] of a prompt, and how far they lead its length at its end."""
        num_tokens = len(input_tokens)
        if not mm_features:
            return torch.arange(num_tokens).expand(3, -1), 0
        [feature] = mm_features
        place = feature.mm_position
        next_position = int(feature.data["kept_next_position"].data)
        num_after = num_tokens - place.offset - place.length
        positions = prompt_positions(
            feature.data["kept_positions"].data.numpy(),
            next_position=next_position,
            num_before=place.offset,
            num_after=num_after,
        )
        return torch.from_numpy(positions), place.offset + next_position + num_after - num_tokens

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: object,
    ) -> Any:
        """Run the layers; see vLLM's Qwen2Model."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return the logits of hidden states."""
        logits: Tensor | None = self.language_model.compute_logits(hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the LLM's tensors of a published checkpoint and pass over all others."""
        own = ((language_model_name(name), tensor) for name, tensor in weights)
        loaded: set[str] = AutoWeightsLoader(self).load_weights(
            (name, tensor) for name, tensor in own if name
        )
        return loaded
