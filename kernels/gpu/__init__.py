"""What operators share on GPUs: launches of Triton kernels, their tuning, device functions."""
