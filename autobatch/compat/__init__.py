"""What differs between builds of torch and torchvision, and between platforms."""
