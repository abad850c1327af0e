"""``python -m compressed_cache.tasks``: prints the folder for ``lm_eval --include_path``."""

from compressed_cache.tasks import PATH

print(PATH)
