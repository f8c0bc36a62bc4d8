"""Scripts for the figures in docs/benchmarks.md, and what they share."""
