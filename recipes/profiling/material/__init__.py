"""What profiling steps learn from: prompts, labelled examples and needles, and reading them from files."""
