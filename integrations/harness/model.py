"""The class behind ``--model hf-compressed`` in releases of lm_eval that load plugins by name."""

from lm_eval.models.huggingface import HFLM

from compressed_cache.integrations.harness.adapter import patch

patch(HFLM)


class CompressedHFLM(HFLM):
    """``--model hf`` under a name of its own; takes the same ``kv_`` arguments."""
