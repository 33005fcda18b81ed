"""Batches of any shape: cut, joined, regrouped, sampled."""
