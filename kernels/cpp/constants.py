"""Sizes that C++ kernels and their callers share; the compiler gets each as the macro BMOJO_<name>."""

MAX_DIMS = 5  # of a tensor
CONV_MAX_WIDTH = 4  # taps of causal_conv1d
CONV_PART_POSITIONS = 64  # positions whose shares of its weight's gradient are added up together
SSD_CHUNK = 64  # positions per chunk of ssd_scan
