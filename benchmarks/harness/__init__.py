"""What every benchmark shares: records, timing, models, the environment and the runner."""
