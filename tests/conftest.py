"""What every test runs under."""

import gc

import torch

# The tests run in parallel, one a core; more threads would only wait for each other.
torch.set_num_threads(1)
# What was imported stays: autobatch collects garbage after a failure, and need not look there.
gc.freeze()
