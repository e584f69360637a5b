"""One file per method: with what the matrix of the tests and the benchmarks run it. A new method's file is a copy of another one's."""
