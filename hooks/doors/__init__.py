"""One file per door: what a step of a plan asks for, what it refuses, and how it installs itself."""
