"""From a logical batch to an optimizer step: cut, run, retry, accumulate, step."""
