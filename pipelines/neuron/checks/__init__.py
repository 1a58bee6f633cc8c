"""What can be shown of a model on Neuron without the hardware: each module is one layer of checks (docs/neuron.md).

They need none of AWS's packages. `bmojo doctor --neuron`, the tests and `python -m benchmarks.neuron_graphs` call them.
"""
