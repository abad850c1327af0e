"""What a run took and what it evicted, recorded without touching the compiled step."""

from compressed_cache.telemetry.measure import Measurement, measure
from compressed_cache.telemetry.recorder import Recorder
from compressed_cache.telemetry.timing import Timing
from compressed_cache.telemetry.trace import Trace

__all__ = ["Measurement", "Recorder", "Timing", "Trace", "measure"]
