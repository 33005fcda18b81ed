"""autobatch: the batch that is wanted, on the device that is there."""
