"""``python -m compressed_cache.tasks``: prints the folder for ``lm_eval --include_path``."""

import argparse

from compressed_cache.tasks import PATH

argparse.ArgumentParser(prog="python -m compressed_cache.tasks", description=__doc__).parse_args()
print(PATH)
