"""Benchmarks of the CUDA kernels. A module makes cases for a `machine.Gpu`, which may be the rehearsal of one."""
