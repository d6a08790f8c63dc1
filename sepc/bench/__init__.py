"""Measuring a model as sepc and others run it, in turn, every output checked: for `sepc-bench` and benchmarks/."""
