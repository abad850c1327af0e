"""``lm_eval --model hf`` takes a compressed cache by arguments that begin with ``kv_``."""
