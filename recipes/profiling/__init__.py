"""What profiling steps share and do: needle prompts, labelled prompts, progress, and the searches of single methods."""
