"""Executes the plans of a step on one rank: tensors, CUDA graphs, sampler, device memory. Decides nothing."""
