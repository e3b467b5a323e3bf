"""The model type `gptq-loader`: the harness's own type, around a model that we loaded.

Importing this registers it; it needs lm_eval, and is imported by the host's `install` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from gptq_loader_plugin.chat.templates import JinjaTemplate
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.loading import load

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["GPTQLoaderLM"]

# Those of the harness's own type for a model that is loaded; its other options are about loading.
HARNESS_OPTIONS = (
    "add_bos_token",
    "batch_size",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "max_length",
    "mixed_precision_dtype",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)
# What the harness passes without --device; its own type, too, takes it for "the best device".
NO_DEVICE = "cuda:0"
OUR_OPTIONS = (
    "backend",
    "context",
    "device",
    "dtype",
    "head",
    "pretrained",
    "revision",
    "template",
)


@register_model("gptq-loader")
class GPTQLoaderLM(HFLM):  # type: ignore[misc] # lm_eval is not typed
    """A GPTQ checkpoint, loaded by us and evaluated as any transformers model."""

    def __init__(
        self,
        pretrained: str,
        *,
        backend: str | None = None,
        context: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        head: Any = None,  # noqa: ANN401 - checked by load
        revision: str | None = None,
        template: str | None = None,
        **options: Any,  # noqa: ANN401 - checked here, by name
    ) -> None:
        """Load a checkpoint.

        Args:
            pretrained: the reference.
            backend: as in `load`, like the next ones.
            context: as in `load`.
            device: as in `load`.
            dtype: as in `load`.
            head: as in `load`.
            revision: as in `load`.
            template: as in `load`; used with --apply_chat_template.
            **options: the harness's, about how to evaluate.

        Raises:
            GPTQLoaderError: it cannot be loaded, or an option is unknown.
        """
        if unknown := sorted(set(options) - set(HARNESS_OPTIONS)):
            raise OptionInvalid(
                f"--model gptq-loader has no option {', '.join(unknown)}",
                hint=f"the options are {', '.join(sorted((*OUR_OPTIONS, *HARNESS_OPTIONS)))}",
            )
        self._loaded = load(
            str(pretrained),
            backend=backend,
            context=context,
            device=None if device == NO_DEVICE else device,
            dtype=dtype,
            head=head,
            revision=revision,
            template=template,
        )
        options.setdefault("max_length", self._loaded.context)
        # else a sum of bfloat16's log-probabilities is rounded to bfloat16: -67.7 becomes -68
        options.setdefault("softmax_dtype", "float32")
        super().__init__(
            pretrained=self._loaded.model,
            tokenizer=self._loaded.tokenizer,
            backend="causal",
            **options,
        )

    def apply_chat_template(
        self,
        chat_history: Sequence[dict[str, str]],
        add_generation_prompt: bool = True,  # noqa: FBT001, FBT002 - the harness's signature
    ) -> str:
        """Render with the checkpoint's template, or the one that was chosen."""
        template = self._loaded.template
        text = template.render(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        prefill = chat_history[-1]["content"]  # of a reply that continues: nothing may follow it
        return text[: text.rindex(prefill) + len(prefill)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:  # noqa: FBT001, FBT002 - the harness's signature
        """Return what the harness records of the template: its text, or a prompt made with it."""
        if not chat_template:
            return None
        template = self._loaded.template
        if isinstance(template, JinjaTemplate):
            return template.text
        return template.render([{"role": "user", "content": "{prompt}"}])

    def get_model_info(self) -> dict[str, Any]:
        """Add the kernels and the quantization to what the harness records of a model."""
        plan = self._loaded.plan
        return {
            **super().get_model_info(),
            "gptq_reference": plan.reference,
            "gptq_kernels": plan.kernels(),
            "gptq_bits": plan.config.bits,
            "gptq_group_size": plan.config.group_size,
            "gptq_desc_act": plan.config.desc_act,
        }
