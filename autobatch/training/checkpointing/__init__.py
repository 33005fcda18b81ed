"""Checkpoints of a training: written, found, restored, and compared with the call that resumes."""
