"""Many runs: sweeps, comparisons, and the evaluation of early exits."""
