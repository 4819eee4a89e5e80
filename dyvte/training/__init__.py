"""From a frozen model to calibrated exit heads: trace, store, fit, calibrate."""
