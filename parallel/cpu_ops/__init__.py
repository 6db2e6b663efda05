"""Operators in C++ for CPUs, each with a twin in torch: built where they run, used where the processor can run them."""
