"""AWS Trainium: what asks TorchNeuron, and checks without the hardware and AWS's packages (docs/neuron.md)."""
