"""Benchmarks: what a job costs and how long it takes, measured side by side. `just bench`; docs/PERFORMANCE.md.

Nothing here passes or fails by the clock: the tests beside the benchmarks check the arithmetic, and that each benchmark
still runs.
"""
