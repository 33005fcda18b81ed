"""Devices: how much memory they have and use, how data reaches them, what their errors mean."""
