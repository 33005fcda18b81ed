"""Differences between operating systems, between builds of torch, and between torch settings."""
