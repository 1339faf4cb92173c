"""What a run is measured by, `hookmap.metrics.logit_difference(" Mary", " John")`: see `hookmap.analysis.metrics`."""

from hookmap.analysis.metrics import (
    NAMES,
    Metric,
    Reading,
    kl_divergence,
    log_probability,
    logit_difference,
    loss,
    probability,
)

__all__ = ["NAMES", "Metric", "Reading", "kl_divergence", "log_probability", "logit_difference", "loss", "probability"]
