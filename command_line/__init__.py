"""The commands of `reattend`, which `reattend.__main__` puts together: what they take, do and print; the work is done below."""
