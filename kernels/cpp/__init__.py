"""C++ kernels for CPU: compiled on the machine that runs them, once, and called through ctypes.

docs/design/0042-cpp-kernels-on-cpu.md says why.
"""
