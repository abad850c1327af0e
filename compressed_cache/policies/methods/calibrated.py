"""What policies share that bring statistics of the model along."""

from dataclasses import dataclass

from torch import Tensor

from compressed_cache.policies import statistics_file as files
from compressed_cache.policies.base import Policy
from compressed_cache.policies.view import LayerContext
from compressed_cache.wording import shown


@dataclass(frozen=True, kw_only=True)
class Calibrated(Policy):
    """A policy with statistics of the model, from a file.

    Raises:
        FileNotFoundError: ``calibration`` is not a file.
        ValueError: it is a file of something else.
    """

    calibration: str | None = None
    """Path of a file that ``compressed-cache calibrate`` wrote for the model, or for
    ``qfilter`` of a ``model.safetensors`` that its authors published (with ``q_filters``), or of a
    folder with ``qfilter.safetensors`` for ``qfilter``, and so on, or with that; None: the file
    that came with this package, as it does for the shipped model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration is not None:
            if not isinstance(self.calibration, str):
                raise TypeError(f"calibration must be a str or None, got {shown(self.calibration)}")
            files.check_policy(self.calibration, self.name)

    def statistics(self, context: LayerContext) -> dict[str, Tensor]:
        """What is known of this layer, the heads at hand, float32; raises as ``constants``."""
        return files.load(self.name, self.calibration, context)
