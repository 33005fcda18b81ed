"""Devices: how much memory they have, how much is used, and what their errors mean."""
