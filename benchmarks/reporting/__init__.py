"""Read results: the report of a device, the comparison of devices, the README's figures."""
