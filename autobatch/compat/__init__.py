"""What differs between builds and settings of torch, its companions and operating systems."""
